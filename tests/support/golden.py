"""The golden vectors, and the model that recorded them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

COPY = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden"
GOLDEN = SHARED if SHARED.is_dir() else COPY


def recorded_model() -> Any:
    """Returns the recorded FLUX transformer; skips the test without diffusers."""
    diffusers = pytest.importorskip("diffusers")
    config = json.loads((GOLDEN / "tiny_flux_config.json").read_text())
    transformer = diffusers.FluxTransformer2DModel(**config)
    transformer.load_state_dict(load_file(GOLDEN / "tiny_flux_weights.safetensors"))
    return transformer.eval()
