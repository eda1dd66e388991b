"""Checks a ComfyUI sampling for inputs that cannot be accelerated correctly, and reads the mask of Fill models."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from jitaccel.errors import UnsupportedModelError
from jitaccel.execution.private import uncompiled

_MODELS = ("Flux", "Chroma")
# Guiders that mix estimates token by token with fixed weights; others may compare whole pictures.
_GUIDERS = ("CFGGuider", "Guider_DualCFG")
_GUIDANCE = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
    "context_handler",
)
_FILL_CHANNELS = 5  # extra channels, as a multiple of the state's: a masked picture (1) and 8 x 8 mask values (4)


def fill_mask(guider: Any, channels: int) -> Tensor | None:
    """Returns the mask (B, 64, H, W) that a Fill model gets next to a state with `channels` channels; None without."""
    for condition in guider.conds.get("positive", []):
        shown = getattr(condition.get("model_conds", {}).get("c_concat"), "cond", None)
        if isinstance(shown, Tensor) and shown.shape[1] == _FILL_CHANNELS * channels:
            return shown[:, channels:]
    return None


def wrappers_of_comfy() -> tuple[str, str, str]:
    """Returns ComfyUI's names of the wrappers around a sampler, a guider's estimate and a model's forward.

    Raises:
        UnsupportedModelError: If this version of ComfyUI lacks one of them.
    """
    from comfy.patcher_extension import WrappersMP

    names = ("SAMPLER_SAMPLE", "PREDICT_NOISE", "DIFFUSION_MODEL")
    missing = [name for name in names if not hasattr(WrappersMP, name)]
    if missing:
        raise UnsupportedModelError(
            f"apply: ComfyUI must have the wrappers {', '.join(names)}, got one without {', '.join(missing)}; "
            f"update it to 0.3.64 or newer"
        )
    sampler, guider, model = (getattr(WrappersMP, name) for name in names)
    return sampler, guider, model


def sampling_problems(
    sampler: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], noise: Tensor
) -> list[str]:
    """Returns every reason why a sampling cannot be sparse; empty if it can. Waits for the device."""
    return [
        *_sampler_problems(sampler),
        *_level_problems(sigmas, noise),
        *_guidance_problems(guider, extra_args.get("model_options", {})),
        *_model_problems(guider.inner_model),
        *_condition_problems(guider),
    ]


def _sampler_problems(sampler: Any) -> list[str]:
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    if name != "sample_euler":
        return [f"the sampler must be 'euler' (first-order), got {name}"]
    churn = getattr(sampler, "extra_options", {}).get("s_churn", 0.0)
    return [f"the sampler must add no noise (s_churn 0), got {churn:g}"] if churn else []


def _level_problems(sigmas: Tensor, noise: Tensor) -> list[str]:
    levels, problems = sigmas.tolist(), []
    falls = all(after < before for before, after in pairwise(levels))
    if not falls or len(levels) < 2 or not 0.0 < levels[0] <= 1.0 or levels[-1] != 0.0:
        problems.append(
            "sigmas must fall from a level in (0, 1] to 0 in one sampler, got "
            f"{', '.join(f'{level:.3g}' for level in (*levels[:2], *levels[-2:]))}; do not split them"
        )
    if not bool(noise.any()):
        problems.append("the sampler must start from new noise, got none: it continues where another one stopped")
    if noise.ndim != 4:
        problems.append(f"latents must be pictures (B, C, H, W), got {tuple(noise.shape)}")
    return problems


def _guidance_problems(guider: Any, options: dict[str, Any]) -> list[str]:
    owner = next(kind.__name__ for kind in type(guider).__mro__ if "predict_noise" in vars(kind))
    problems = []
    if owner not in _GUIDERS:
        problems.append(f"the guider must be one of {', '.join(_GUIDERS)} (linear), got {owner}")
    for name in _GUIDANCE:
        if options.get(name):
            functions = options[name] if isinstance(options[name], (list, tuple)) else [options[name]]
            what = ", ".join(getattr(each, "__qualname__", type(each).__qualname__) for each in functions)
            problems.append(f"guidance must be ComfyUI's own, got {name} {what}")
    return problems


def _model_problems(inner: Any) -> list[str]:
    model = uncompiled(inner.diffusion_model)
    kind = type(model).__name__
    if kind not in _MODELS or not hasattr(model, "forward_orig"):
        return [f"the model must be one of FLUX.1, FLUX.2 and Chroma, got {kind}"]
    sampling = type(inner.model_sampling)
    if not any(base.__name__ == "CONST" for base in sampling.__mro__):
        return [f"the model must predict velocities (CONST), got {sampling.__name__}"]
    return []


def _condition_problems(guider: Any) -> list[str]:
    given = [condition for several in guider.conds.values() for condition in several]
    if any("area" in condition for condition in given):
        return ["conditions must apply to the whole picture, got some with an area; use masks"]
    return []
