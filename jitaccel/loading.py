"""Loads a pipeline from a folder or the Hugging Face hub; a failure is reported in one line."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CommandError
from .files import is_there

_NEEDED = ("diffusers", "transformers", "accelerate", "PIL")
DTYPES = ("auto", "float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "sequential")
EMBEDDED_TEXT_TOKENS = 48  # the embedded model's captions are shorter; its default of 512 would be mostly padding


@dataclass(frozen=True, kw_only=True)
class PictureSizes:
    """The picture sizes of a pipeline, in pixels: both sides must be multiples of `unit`, `side` is their default."""

    unit: int
    side: int


def picture_sizes(model: str | None) -> PictureSizes | None:
    """Returns the picture sizes of a pipeline, read from its autoencoder's configuration without loading weights.

    Args:
        model: Folder, hub id, or None for the embedded pipeline.

    Returns:
        The sizes, or None if the configuration does not give them.

    Raises:
        CommandError: For a folder that is not a pipeline, and for a hub id that is gated, unknown or unreachable.
    """
    config = _settings(model, "vae/config.json")
    if not {"block_out_channels", "sample_size"} <= config.keys():
        return None
    return PictureSizes(unit=2 ** len(config["block_out_channels"]), side=int(config["sample_size"]))


def pipeline_class(model: str | None) -> type | None:
    """Returns the class of diffusers that runs a model, from the model's index alone: no weights are loaded.

    Args:
        model: Folder, hub id, or None for the embedded pipeline.

    Returns:
        The class, or None if the index does not name a class of diffusers.

    Raises:
        CommandError: As `picture_sizes`.
    """
    name = _settings(model, "model_index.json").get("_class_name")
    _quieten(progress_bars=False)
    import diffusers

    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) else None


def _settings(model: str | None, name: str) -> Mapping[str, Any]:
    """Returns the content of a small JSON file of a model, or {} if the model does not have it."""
    require_diffusers()
    source = _checked_source(model)
    file = Path(source) / name if Path(source).is_dir() else _from_hub(source, name)
    if file is None or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError:  # loading it says what is wrong
        return {}
    return found if isinstance(found, dict) else {}


def _from_hub(model: str, name: str) -> Path | None:
    """Returns a small file of a hub model, from the cache if present, or None if the model does not have it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _hub_errors(model):
        try:
            return Path(hf_hub_download(model, name))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None


@contextmanager
def _hub_errors(model: str, option: str = "--model") -> Iterator[None]:
    """Turns errors of the hub (model gated, unknown or unreachable) into a CommandError that says what to do."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # suppress one line per retry; the final error says enough
    try:
        yield
    except GatedRepoError as error:
        raise CommandError(
            f"{option} must be one that you may read, got {model}, which is gated; accept its licence at "
            f"https://huggingface.co/{model}, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CommandError(
            f"{option} must be a model on the hub, got {model}, which is not there or not visible to you; check the "
            f"name, or log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise CommandError(
            f"{option} must be in the cache or reachable, got {model}: the hub does not answer or HF_HUB_OFFLINE is "
            f"set, and the cache does not have it; connect once, or give a folder"
        ) from error


def load_pipeline(
    model: str | None,
    dtype: str = "auto",
    device: str = "auto",
    offload: str = "none",
    *,
    pickle: bool = False,
    kind: type | None = None,
    controlnet: str | None = None,
) -> Any:
    """Returns the diffusers pipeline of a folder or hub id, placed on its device.

    Args:
        model: Folder, hub id, or None for the embedded pipeline.
        dtype: One of DTYPES; "auto" is bfloat16 on CUDA, float32 elsewhere.
        device: Name of a torch device; "auto" is CUDA if present.
        offload: One of OFFLOADS: "none" puts the whole pipeline on the device, "model" one component at a time,
            "sequential" one layer at a time.
        pickle: Whether to accept weights in formats other than safetensors. Loading those runs code stored in them.
        kind: Class of pipelines of diffusers; None for the one that the model names.
        controlnet: Folder or hub id of a ControlNet for it.

    Raises:
        CommandError: For missing packages, folders and devices, and for a hub model that cannot be read.
    """
    require_diffusers()
    source = _checked_source(model)
    torch_device = pick_device(device)
    check_offload(offload, torch_device)

    import torch

    _quieten(progress_bars=model is None)
    from diffusers import AutoModel, DiffusionPipeline

    from .patches.diffusers_private import dtype_argument

    is_cuda = torch_device.type == "cuda"
    name = dtype if dtype != "auto" else "bfloat16" if is_cuda else "float32"
    settings = {dtype_argument(): getattr(torch, name), "use_safetensors": None if pickle else True}
    parts = {}
    if controlnet is not None:
        local = Path(controlnet).expanduser()
        controlnet = str(local) if is_there(local) else controlnet
        parts["controlnet"] = _loaded(AutoModel, controlnet, "--controlnet", "ControlNet", settings)
    pipe = _loaded(kind or DiffusionPipeline, source, "--model", "pipeline", {**settings, **parts})
    if offload == "model":
        pipe.enable_model_cpu_offload(device=torch_device)
        return pipe
    if offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=torch_device)
        return pipe
    return pipe.to(torch_device)


def _loaded(kind: Any, source: str, option: str, what: str, settings: Mapping[str, Any]) -> Any:
    """Returns a pipeline or model of diffusers. Raises CommandError, which names `option`, if it does not load."""
    try:
        with _hub_errors(source, option):
            return kind.from_pretrained(source, **settings)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        advice = (
            "; --pickle also loads weights in formats other than safetensors" if settings["use_safetensors"] else ""
        )
        raise CommandError(
            f"{option} must be a diffusers {what} that loads, got {source}: {lines[0]}{advice}"
        ) from error


def _quieten(progress_bars: bool) -> None:
    """Silences transformers' notes on packages that FLUX does not need and, optionally, short progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if progress_bars:
        from diffusers.utils import logging as diffusers_logging

        logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()


def require_diffusers() -> None:
    """Raises CommandError if a package needed to load pipelines is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"diffusers and the packages it loads models with must be installed, got no {', '.join(missing)}; "
            f'pip install "jitaccel[diffusers]"'
        )


def pick_device(name: str) -> Any:
    """Returns the torch device of a name; "auto" is CUDA if present. Raises CommandError for an unavailable device."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CommandError(
            f"--device must be a device of this machine, got {name!r}: {lines[0]}; `jitaccel doctor` lists them"
        ) from error
    return device


def check_offload(offload: str, device: Any) -> None:
    """Raises CommandError if offloading is requested on the CPU, where weights cannot be moved away."""
    if offload != "none" and device.type == "cpu":
        raise CommandError(
            f"--offload must be none on the CPU, got {offload}; it moves weights between the CPU and an accelerator; "
            f"if this machine has one, `jitaccel doctor` says why torch does not use it"
        )


def _checked_source(model: str | None) -> str:
    if model is None:
        from .api import embedded_model

        folder = embedded_model()
        if not (folder / "model_index.json").is_file():
            raise CommandError(f"the embedded model must be installed, got nothing in {folder}; give --model")
        return str(folder)
    path = Path(model).expanduser()
    if is_there(path):
        if not (path / "model_index.json").is_file():
            raise CommandError(f"--model must be a folder in diffusers format, got {model} without model_index.json")
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise CommandError(f"--model must be an existing folder or a hub id owner/name, got {model[:80]!r}")
    return model


def picture_side(pipe: Any) -> int:
    """Returns the side in pixels of the pictures a pipeline was made for, as its autoencoder gives it."""
    return int(pipe.vae.config.sample_size)


def size_unit(pipe: Any) -> int:
    """Returns the side of a token in pixels; a pipeline's height and width must be multiples of it."""
    from .execution.private import uncompiled
    from .patches.models import model_of

    names = ("vae_scale_factor_spatial", "vae_scale_factor", "vae_spatial_compression_ratio")
    scale = next((int(scale) for name in names if (scale := getattr(pipe, name, None))), 8)
    network = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    model = model_of(network)
    return 2 * scale if model is None else model.layout(uncompiled(network).config).side * scale


def makes_videos(kind: type) -> bool:
    """Returns whether pipelines of a class make videos, that is, whether their calls take a number of frames."""
    from .patches.diffusers.asked import parameters_of

    return "num_frames" in parameters_of(kind)
