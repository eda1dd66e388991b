"""Stages as files for deployment: `jitaccel.export` writes them, `jitaccel.load_exported` runs them.

    jitaccel.export(pipe, "flux-7x", preset="7x", size=(1024, 1024))
    handle = jitaccel.load_exported("flux-7x").apply(pipe)   # pipe may have been loaded with transformer=None

The folder holds one artefact per stage (gather, network, lift and Euler step), the weights once, and the manifest
(`jitaccel/artefacts/manifest.py`). A stage is a function of tensors alone,

    (weights, state, anchors, nearest, blur, text, pooled, guidance, levels) -> (velocity, next_state)
    (weights, state, text, pooled, guidance, levels) -> (velocity, next_state)       if the stage pools the picture

with the weights in the order of their names: state, velocity, next_state (B, N, D); anchors (B, M), nearest (B, N)
int64; blur (W,) float32; text (B, L, E); pooled (B, P); guidance (B,) float32; levels (2,) float32. `next_state` is the
result of Euler's step; for `solver="dpmpp_2m"`, the program adds the correction that `solver_gains` in the manifest
defines (`manifest.py`).
"""

from __future__ import annotations

import inspect
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from .. import ops
from ..errors import ArtefactError, ConfigError, UnsupportedModelError, suggestion
from ..execution.options import Attention
from ..execution.private import load_aoti_package, write_aoti_package
from ..generation import registry
from ..generation.handle import Handle
from ..limits import MOST_BATCH, MOST_TEXT_TOKENS
from ..method.config import JiTConfig
from ..method.grid import num_tokens_of
from ..method.overrides import Overrides, arguments_of, check_fields
from ..method.presets import PresetName, resolve
from .manifest import TENSORS, WEIGHTS, Format, Input, Manifest, file_digest, manifest_tensors, processor, write_tensors

Stage = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """The stages that a codebase exports: modules of one network, each with an example call by name.

    The state (B, N, D) comes first; names, shapes and dtypes of the call become the input declarations in the manifest.

    levels: S + 1 noise levels. model: configuration of the network, which its stand-in exposes. device, dtype: of
    states.
    """

    codebase: str
    stages: Sequence[tuple[nn.Module, Mapping[str, Tensor]]]
    levels: tuple[float, ...]
    grid: tuple[int, ...]
    model: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype


def export(
    target: Any,
    folder: str | Path,
    preset: PresetName | str | JiTConfig = "7x",
    *,
    size: tuple[int, int],
    format: Format = "aoti",
    batch_size: int = 1,
    text_tokens: int = 512,
    attention: Attention = "sdpa",
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **overrides: Unpack[Overrides],
) -> Path:
    """Writes one artefact for each stage of a preset, the weights and a manifest into a new folder, and returns it.

    The result works only for this size, batch, dtype, device type, processor and torch.

    Args:
        target: A diffusers `FluxPipeline` that is not patched. LoRA layers are exported with their scales.
        folder: Must not exist.
        preset: Name of a preset, or a JiTConfig.
        size: (height, width) in pixels.
        format: "aoti" compiles each stage to native code (AOTInductor; at least a minute per stage). "torchscript"
            traces it, for runtimes that still load that.
        batch_size: Images of every later call; with true CFG, each branch is a separate call.
        text_tokens: Length of the prompts of every later call, including padding.
        attention: "sdpa" runs wherever torch does.
        options: Options of Inductor.
        progress: Called with the number of stages written and the total, once before the first stage and after each.
        **overrides: Fields of JiTConfig.

    Raises:
        ConfigError: For invalid settings, and if the folder exists.
        UnsupportedModelError: For a pipeline that cannot be exported.
    """
    from .. import patches

    if format not in get_args(Format):
        raise ConfigError(
            f"export: format must be one of {', '.join(get_args(Format))}, got {format!r}; "
            f"{suggestion(format, get_args(Format))}"
        )
    check_fields("export", overrides, arguments_of(export))
    config, folder = resolve(preset, **overrides), _path("export", folder)
    _check_export(size, attention, options)
    if folder.exists():
        raise ConfigError(f"export: folder must not exist, got {str(folder)!r}; give another name, or remove it")
    for name, value, most in (("batch_size", batch_size, MOST_BATCH), ("text_tokens", text_tokens, MOST_TEXT_TOKENS)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ConfigError(
                f"export: {name} must be a whole number in 1..{most}, got {value!r}; give the value of later calls"
            )
    if format == "aoti":
        check_compiler_paths()
    patch = patches.find(target)
    if patch.export is None:
        raise UnsupportedModelError(
            f"export: target must be a FluxPipeline, the only one whose stages can be exported, got "
            f"{type(target).__name__}; apply(pipeline, compile=True) compiles the stages of other models as they run"
        )
    exportable: Exportable = patch.export(target, config, size, batch_size, text_tokens, attention)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written next to it and then moved, so an interrupted export leaves no folder that looks complete.
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        report = progress or (lambda done, total: None)
        _write(partial, exportable, config, format, batch_size, text_tokens, attention, options or {}, report)
        partial.chmod(_mode_of_folders(partial))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return folder


def _path(function: str, folder: Any) -> Path:
    try:
        path = Path(folder)
        path.stat()
    except FileNotFoundError:
        return path
    except (TypeError, ValueError, OSError) as error:  # not a path, a null character, or a name that is too long
        raise ConfigError(
            f"{function}: folder must be a path, got {folder!r:.200} ({error!s:.200}); "
            f"give its name, for example 'flux-7x'"
        ) from None
    return path


def _check_export(size: Any, attention: Any, options: Any) -> None:
    """Raises ConfigError for settings of the wrong type."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ConfigError(f"export: size must be (height, width) in pixels, got {size!r}; give (1024, 1024)")
    if attention not in get_args(Attention):
        raise ConfigError(
            f"export: attention must be one of {', '.join(get_args(Attention))}, got {attention!r}; "
            f"{suggestion(attention, get_args(Attention))}"
        )
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"export: options must be a mapping of Inductor's options, got {options!r}; leave it out")


def check_compiler_paths() -> None:
    """Raises ConfigError if Inductor could not call its compiler, because it does not quote the path of torch."""
    where = str(Path(torch.__file__).parent)
    if any(letter.isspace() for letter in where):
        raise ConfigError(
            f'export: torch must lie in a folder without spaces for format="aoti", got {where!r}; make the environment '
            f'in another folder, or use format="torchscript"'
        )


def _write(
    folder: Path,
    exportable: Exportable,
    config: JiTConfig,
    format: Format,
    batch: int,
    text_tokens: int,
    attention: str,
    options: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> None:
    weights = weights_of(exportable.stages[0][0])
    write_tensors(folder / WEIGHTS, weights)
    write_tensors(folder / TENSORS, manifest_tensors(config, exportable.levels, exportable.grid))
    counts = config.stage_tokens(exportable.grid)
    device = exportable.device.type
    manifest = Manifest(
        format=format,
        codebase=exportable.codebase,
        config=config,
        levels=exportable.levels,
        tokens=counts,
        grid=exportable.grid,
        batch=batch,
        text_tokens=text_tokens,
        inputs=tuple(
            tuple(Input.of(name, tensor) for name, tensor in arguments.items()) for _, arguments in exportable.stages
        ),
        dtype=str(exportable.dtype).removeprefix("torch."),
        device=device,
        processor=processor(exportable.device),
        torch_version=torch.__version__,
        attention=attention,
        operators=(device,) if device in ops.compiled() and counts[0] < num_tokens_of(exportable.grid) else (),
        model=exportable.model,
        files={},
    )
    for done, ((stage, arguments), name) in enumerate(zip(exportable.stages, manifest.stage_files, strict=True)):
        progress(done, len(exportable.stages))
        _lower(stage, weights, tuple(arguments.values()), folder / name, format, options)
    progress(len(exportable.stages), len(exportable.stages))
    names = (WEIGHTS, TENSORS, *manifest.stage_files)
    replace(manifest, files={name: file_digest(folder / name) for name in names}).write(folder)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers, detached, in the order of their names.

    Raises UnsupportedModelError for weights that are not plain floating-point tensors: quantised weights call code that
    an exported stage does not include.
    """
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, weight in found.items():
        if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.is_meta:
            raise UnsupportedModelError(
                f"export: weights must be plain floating tensors, got {type(weight.data).__name__} of {weight.dtype} "
                f"for {name}; export the model as it was before quantisation or offloading"
            )
    return {name: found[name].detach() for name in sorted(found)}


class _Functional(nn.Module):
    """A stage as a function that also takes its weights, instead of holding them, so that stages share them."""

    def __init__(self, stage: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._stage = [stage]  # in a list, so that it is not registered as a submodule
        self._names = list(names)

    def forward(self, weights: list[Tensor], *arguments: Tensor) -> Any:
        return functional_call(self._stage[0], dict(zip(self._names, weights, strict=True)), arguments)


def _lower(
    stage: nn.Module,
    weights: Mapping[str, Tensor],
    arguments: tuple[Tensor, ...],
    path: Path,
    format: Format,
    options: Mapping[str, Any],
) -> None:
    with torch.no_grad(), _without_warnings():
        inputs = ([*weights.values()], *arguments)
        program = torch.export.export(_Functional(stage, [*weights]), inputs, strict=False)
        if format == "aoti":
            write_aoti_package(program, path, options)
            return
        takes_guards = "check_guards" in inspect.signature(program.module).parameters
        flat = program.module(check_guards=False) if takes_guards else program.module()
        torch.jit.trace(flat, inputs, check_trace=False, strict=False).save(str(path))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences the deprecation of TorchScript, and tracing's warnings on shape checks, which are constants here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def _mode_of_folders(folder: Path) -> int:
    """Returns the mode that the umask gives a new folder inside `folder`; mkdtemp's mode is for one user."""
    example = folder / ".mode"
    example.mkdir()
    mode = example.stat().st_mode & 0o777
    example.rmdir()
    return mode


class Exported:
    """Loaded stages. `manifest`: describes what they were exported for. `device`: where they run."""

    def __init__(
        self, manifest: Manifest, device: torch.device, stages: Sequence[Stage], weights: list[Tensor]
    ) -> None:
        self.manifest, self.device = manifest, device
        self._stages, self._weights = stages, weights

    def run(self, stage: int, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (velocity, next_state) of a stage, 0 the sparsest; arguments as the module's docstring lists them.

        Raises ArtefactError for an argument whose shape, dtype or device differs from the exported one.
        """
        self.manifest.check_arguments(stage, arguments)
        with torch.no_grad():
            velocity, state = self._stages[stage](self._weights, *(x.contiguous() for x in arguments))
        return velocity, state

    def apply(self, pipeline: Any) -> Handle:
        """Makes a pipeline denoise with these stages instead of its transformer, and returns a handle.

        `remove()` restores the transformer.

        Args:
            pipeline: Of the exported kind. Its own transformer is not called and may be None. Its calls must have the
                exported size, batch and text length.

        Raises:
            UnsupportedModelError: For other pipelines.
            ConfigError: For a pipeline that is already patched.
        """
        from .. import patches

        patch = patches.find(pipeline)
        if patch.prepare_exported is None:
            raise UnsupportedModelError(
                f"Exported.apply: pipeline must be a {self.manifest.codebase}, got {type(pipeline).__name__}; pass one"
            )
        handle = Handle(pipeline, patch.prepare_exported(pipeline, self))
        registry.put_in_place(handle)
        return handle


def load_exported(folder: str | Path, device: str | torch.device | None = None) -> Exported:
    """Returns the stages that `export` wrote into a folder, checked and ready to run; needs no code of the model.

    Stages are native programs: load only folders from a source you trust to run programs. Python unpickles nothing.

    Args:
        folder: A folder written by `export`.
        device: None uses the exported device type.

    Raises:
        ArtefactError: For files that are missing, truncated or altered, and if torch, device or processor differ from
            the exported ones.
    """
    folder = _path("load_exported", folder)
    manifest = Manifest.read(folder)
    try:
        where = torch.device(manifest.device if device is None else device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"load_exported: device must be a device of torch, got {device!r} ({error}); leave it out"
        ) from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ArtefactError(
            "load_exported: device must be available, got stages for cuda but no CUDA device; use a machine with one"
        )
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    manifest.check_machine(where)
    manifest.check_files(folder)
    weights = load_file(folder / WEIGHTS, device=str(where))
    load = {"aoti": _load_aoti, "torchscript": _load_torchscript}[manifest.format]
    stages = [load(folder / name, where) for name in manifest.stage_files]
    return Exported(manifest, where, stages, [weights[name] for name in sorted(weights)])


def _load_aoti(path: Path, device: torch.device) -> Stage:
    index = -1 if device.index is None else device.index
    stage: Stage = load_aoti_package(path, index)
    return stage


def _load_torchscript(path: Path, device: torch.device) -> Stage:
    with _without_warnings():
        stage: Stage = torch.jit.load(str(path), map_location=device)
    return stage
