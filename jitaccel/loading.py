"""Loads a pipeline from a folder or the Hugging Face hub, and says in one line why it cannot."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .errors import CommandError

_NEEDED = ("diffusers", "transformers", "accelerate", "PIL")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EMBEDDED_TEXT_TOKENS = 48  # the embedded model's captions are shorter; its default of 512 would be mostly padding


def load_pipeline(model: str | None, dtype: str = "auto", device: str = "auto", *, pickle: bool = False) -> Any:
    """Returns the diffusers pipeline in a folder or of a hub id, on its device; None: the embedded one.

    dtype "auto": bfloat16 on CUDA, float32 elsewhere. device "auto": CUDA where there is one. pickle: whether weights
    may be other files than safetensors; loading those runs code that they hold.

    Raises CommandError for missing packages, folders and devices.
    """
    require_diffusers()
    source = _checked_source(model)
    torch_device = pick_device(device)

    import torch

    _quieten(progress_bars=model is None)
    from diffusers import DiffusionPipeline

    from .patches.diffusers_private import dtype_argument

    is_cuda = torch_device.type == "cuda"
    name = dtype if dtype != "auto" else "bfloat16" if is_cuda else "float32"
    try:
        settings = {dtype_argument(): getattr(torch, name), "use_safetensors": None if pickle else True}
        pipe = DiffusionPipeline.from_pretrained(source, **settings)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        advice = "" if pickle else "; --pickle loads weights that are no safetensors, too"
        raise CommandError(
            f"--model must be a diffusers pipeline that loads, got {source}: {lines[0]}{advice}"
        ) from error
    return pipe.to(torch_device)


def _quieten(progress_bars: bool) -> None:
    """Silences what transformers says about packages that no FLUX pipeline needs, and bars that last a moment."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if progress_bars:
        from diffusers.utils import logging as diffusers_logging

        logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()


def require_diffusers() -> None:
    """Raises CommandError where a package that loads pipelines is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"diffusers and what it loads models with must be installed, got no {', '.join(missing)}; "
            f'pip install "jitaccel[diffusers]"'
        )


def pick_device(name: str) -> Any:
    """Returns the torch device of a name, "auto" for CUDA where there is one. Raises CommandError for one not here."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CommandError(f"--device must be a device of this machine, got {name!r}: {lines[0]}") from error
    return device


def _checked_source(model: str | None) -> str:
    if model is None:
        from .api import embedded_model

        folder = embedded_model()
        if not (folder / "model_index.json").is_file():
            raise CommandError(f"the embedded model must be installed, got nothing in {folder}; give --model")
        return str(folder)
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise CommandError(f"--model must be a folder in diffusers format, got {model} without model_index.json")
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise CommandError(f"--model must be an existing folder or a hub id owner/name, got {model!r}")
    return model


def picture_side(pipe: Any) -> int:
    """Returns the side in pixels of the pictures that a pipeline was made for: what its autoencoder says."""
    return int(pipe.vae.config.sample_size)


def size_unit(pipe: Any) -> int:
    """Returns what height and width of a pipeline must be multiples of: a token's side in pixels."""
    from .execution.private import uncompiled
    from .patches.models import model_of

    names = ("vae_scale_factor_spatial", "vae_scale_factor", "vae_spatial_compression_ratio")
    scale = next((int(scale) for name in names if (scale := getattr(pipe, name, None))), 8)
    network = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    model = model_of(network)
    return 2 * scale if model is None else model.layout(uncompiled(network).config).side * scale
