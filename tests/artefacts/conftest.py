"""One export shared by all tests, and copies of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.support import tiny
from tests.support.exports import TWO_STAGES, export


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages of the pipeline with seed 0, traced."""
    return export(tiny.pipeline(), tmp_path_factory.mktemp("artefacts") / "with space")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.fixture(scope="session")
def aoti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of the pipeline with seed 0, compiled."""
    if " " in torch.__file__:
        pytest.skip("torch's inductor does not quote its own path to the C++ compiler")
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    folder = tmp_path_factory.mktemp("artefacts") / "aoti"
    return export(tiny.pipeline(), folder, TWO_STAGES, format="aoti", options=options)
