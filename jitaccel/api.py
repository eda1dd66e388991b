"""The main entry point: `jitaccel.apply(target, preset="7x")`."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from .errors import ConfigError, UnsupportedModelError, suggestion
from .execution.options import Attention, ControlNet, Execution, Mode, Unsupported
from .generation import registry
from .generation.handle import Handle
from .method.config import JiTConfig
from .method.overrides import Overrides, arguments_of, check_fields
from .method.presets import PRESETS, PresetName, resolve
from .speed.target import Auto

if TYPE_CHECKING:
    from .speed.auto import Choice

_log = logging.getLogger(__name__)


def apply(
    target: Any,
    preset: PresetName | Literal["auto"] | str | JiTConfig | Auto = "7x",
    *,
    noise_levels: Sequence[float] | None = None,
    execution: Mode = "auto",
    attention: Attention = "auto",
    compile: bool | str | Mapping[str, Any] = False,
    strict: bool = False,
    on_unsupported: Unsupported = "error",
    controlnet: ControlNet = "dense",
    target_speedup: float | None = None,
    target_ms: float | None = None,
    size: tuple[int, int] | None = None,
    text_tokens: int | None = None,
    **overrides: Unpack[Overrides],
) -> Handle:
    """Makes `target`, a pipeline or transformer, compute only sparse anchor tokens at first, and returns a handle.

    Just-in-Time spatial acceleration (arXiv:2603.10744). Only the given instances are changed; `handle.remove()`
    restores them bit for bit. Applying to the same target again replaces the earlier configuration.

    Args:
        target: One of these (docs/codebases.md lists them all). A diffusers pipeline of FLUX.1, FLUX.2, Chroma, Wan,
            HunyuanVideo, LTX-Video, Qwen-Image, Stable Diffusion 3, Z-Image or another model in docs/models.md;
            jitaccel follows its scheduler and updates the state inside the scheduler's `step`. The bare transformer of
            such a pipeline, or Black Forest Labs' `Flux`, in your own Euler loop; the update is folded into the
            returned velocity. ComfyUI's `ModelPatcher`.
        preset: The name of a preset ("4x", "7x", "10x", "few-steps", "dense", or the paper's "4x-paper" and
            "7x-paper"), a JiTConfig, or a target speed such as `jitaccel.Auto(speedup=8)`. With a target speed,
            jitaccel times a few steps and picks steps and densities; `handle.choice` reports the choice and the reason.
            On video models, a preset given by name keeps the sampler's own noise levels; `schedule="beta"` uses the
            preset's levels instead.
        noise_levels: For a bare transformer: the noise levels of the loop that will call it, first to last, including
            the final 0. If omitted, they are predicted from the preset's levels and corrected during the loop.
        execution: "packed" runs all images of a batch as one packed sequence in one forward. "indexed" runs the model's
            own forward on the anchors. "auto" uses "packed" where it is supported. `handle.stats()` reports which one
            ran and why.
        attention: Attention backend of packed execution: "auto", "flash_attn_3", "flash_attn", "torch_varlen",
            "xformers" or "sdpa".
        compile: Whether to compile each stage with static shapes and, on CUDA, capture it as a CUDA graph. True, a mode
            of `torch.compile` ("max-autotune", ...), or a dict with any of `backend`, `mode` and `options` (passed to
            `torch.compile`) and `graphs` (whether to capture). Compilation and capture happen at the first generation
            of each size and batch, or in `handle.warmup`.
        strict: Raise UnsupportedModelError instead of running a fallback.
        on_unsupported: What to do with a target, sampler or call that cannot be accelerated correctly. "error" raises.
            "dense" logs a warning and runs it dense, which `handle.stats()` then reports; a pipeline call keeps the
            number of steps and the noise levels that the configuration has already set.
        controlnet: "dense" runs a pipeline's ControlNet on every token. "anchors" runs it on the anchors alone, which
            is cheaper but gives it less of the picture.
        target_speedup: With preset="auto": as `Auto(speedup=...)`.
        target_ms: With preset="auto": as `Auto(ms=...)`.
        size: With preset="auto": as `Auto(size=...)`.
        text_tokens: With preset="auto": as `Auto(text_tokens=...)`.
        **overrides: Fields of JiTConfig, for example `steps=14` or `micro_flow="exact"`.

    Returns:
        The handle, with `stats()`, `warmup()` and `remove()`. It is also a context manager.

    Raises:
        ConfigError: For invalid settings; the message lists every problem.
        UnsupportedModelError: For a target that cannot be accelerated correctly.
    """
    from . import patches

    _check_is_object(target)
    check_fields("apply", overrides, arguments_of(apply))
    keywords = {"target_speedup": target_speedup, "target_ms": target_ms, "size": size, "text_tokens": text_tokens}
    auto = _wanted_speed(preset, keywords, overrides, noise_levels)
    named = "dense" if isinstance(preset, Auto) or auto is not None else _checked_preset(preset)
    config = resolve(named, **{**_defaults(target, preset), **overrides})
    levels = None if noise_levels is None else _checked_levels(noise_levels)
    how = Execution(
        execution=execution,
        attention=attention,
        compile=_compile_options(compile),
        strict=strict,
        on_unsupported=on_unsupported,
        controlnet=controlnet,
    )
    choice = None
    try:
        if auto is not None:
            choice = _choice(target, auto, how, overrides)
            config = choice.config
        installation = patches.find(target).prepare(target, config, levels, how)
    except UnsupportedModelError as error:
        if not how.may_be_dense:
            raise
        from .generation.dense import leave_dense

        installation = leave_dense(target, config, error)
    handle = Handle(target, installation)
    handle.choice = choice
    registry.put_in_place(handle)
    return handle


def _checked_preset(preset: str | JiTConfig) -> str | JiTConfig:
    """Returns a valid preset. Raises ConfigError for an unknown name, suggesting the most similar one or "auto"."""
    if isinstance(preset, JiTConfig) or (isinstance(preset, str) and preset in PRESETS):
        return preset
    names = (*PRESETS, "auto")
    raise ConfigError(
        f"apply: preset must be one of {', '.join(names)}, a JiTConfig or an Auto, got {preset!r}; "
        f"{suggestion(preset, names)}"
    )


def _check_is_object(target: Any) -> None:
    """Raises ConfigError for a target that cannot be a pipeline or a network, such as None, a name or a path."""
    try:
        weakref.ref(target)
    except TypeError:
        raise ConfigError(
            f"apply: target must be a loaded pipeline or network, got {target!r}; load it first, for example with "
            f"FluxPipeline.from_pretrained(...)"
        ) from None


def _defaults(target: Any, preset: str | JiTConfig | Auto) -> Mapping[str, Any]:
    """Returns the fields that this kind of model overrides in a preset given by name: video keeps its own levels."""
    from . import patches

    if not isinstance(preset, str):
        return {}
    try:
        patch = patches.find(target)
    except UnsupportedModelError:
        return {}
    return {} if patch.defaults is None else patch.defaults(target)


def _wanted_speed(
    preset: str | JiTConfig | Auto,
    keywords: Mapping[str, Any],
    overrides: Mapping[str, Any],
    levels: Sequence[float] | None,
) -> Auto | None:
    """Returns the speed requested instead of a preset, or None. Raises ConfigError for conflicting arguments."""
    is_auto = isinstance(preset, str) and preset == "auto"
    if not is_auto:
        advice = "set it in Auto" if isinstance(preset, Auto) else 'leave it out, or use preset="auto"'
        if problems := [
            f'apply: {name} must be left out unless preset="auto", got {value!r}; {advice}'
            for name, value in keywords.items()
            if value is not None
        ]:
            raise ConfigError("\n".join(problems))
        if not isinstance(preset, Auto):
            return None
    from .speed.auto import check_target

    speedup = preset.speedup if isinstance(preset, Auto) else keywords["target_speedup"]
    ms = preset.ms if isinstance(preset, Auto) else keywords["target_ms"]
    check_target(speedup, ms, overrides)
    if levels is not None:
        raise ConfigError(
            'apply: noise_levels must be left out with preset="auto", which picks them, got a list; '
            "let the loop follow jitaccel.noise_levels(handle.config)"
        )
    if isinstance(preset, Auto):
        return preset
    return Auto(
        speedup=keywords["target_speedup"],
        ms=keywords["target_ms"],
        size=keywords["size"],
        text_tokens=keywords["text_tokens"],
    )


def _choice(target: Any, wanted: Auto, how: Execution, overrides: Mapping[str, Any]) -> Choice:
    from .speed.auto import decide, measure_costs

    costs = measure_costs(target, wanted.size, wanted.text_tokens, how, call=wanted.call)
    choice = decide(costs, target_speedup=wanted.speedup, target_ms=wanted.ms, **overrides)
    _log.info("jitaccel: %s", choice)
    return choice


def _compile_options(value: bool | str | Mapping[str, Any]) -> dict[str, Any] | None:
    if value is False:
        return None
    from .execution.compile import compile_options  # here, because the compiler takes a second to import

    return compile_options(value)


def _checked_levels(levels: Sequence[float]) -> tuple[float, ...]:
    try:
        values = () if isinstance(levels, (str, bytes)) else tuple(float(level) for level in levels)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"apply: noise_levels must be numbers, got {levels!r} ({error}); give sigmas from a level in (0, 1] to 0.0"
        ) from error
    falls = all(after < before for before, after in pairwise(values))
    if len(values) < 2 or not falls or not 0.0 < values[0] <= 1.0 or values[-1] != 0.0:
        raise ConfigError(
            f"apply: noise_levels must fall strictly from a level in (0, 1] to 0.0, got {values}; "
            f"give sigmas, not timesteps of 0 to 1000, and the final 0.0"
        )
    return values


def embedded_model() -> Path:
    """Returns the folder of the small FLUX pipeline that comes with this package, in diffusers format."""
    with as_file(files("jitaccel.assets") / "tiny-flux") as folder:
        return Path(folder)
