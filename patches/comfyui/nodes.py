"""The nodes. ComfyUI reads their inputs from `INPUT_TYPES` and calls the method named by `FUNCTION`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import jitaccel

_PRESETS = [name for name, config in jitaccel.PRESETS.items() if config.num_stages > 1]
_DEFAULT = "7x"


class JiTApply:
    """Returns a clone of a FLUX model that computes only sparse anchor tokens in the early steps of a sampler."""

    CATEGORY = "jitaccel"
    DESCRIPTION = (
        "Just-in-Time acceleration (arXiv:2603.10744) of FLUX.1, FLUX.2 and Chroma. Use the sampler 'euler', with the "
        "levels of JiT Sigmas or any others."
    )
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the node's inputs."""
        what = "What to do if this sampling cannot be accelerated correctly. error: stop; dense: run unaccelerated"
        return {
            "required": {
                "model": ("MODEL",),
                "preset": (list(_PRESETS), {"default": _DEFAULT}),
                "on_unsupported": (["error", "dense"], {"default": "error", "tooltip": what}),
            }
        }

    def apply(self, model: Any, preset: str, on_unsupported: str) -> tuple[Any]:
        """Returns the clone; the given model is not changed."""
        clone = model.clone()
        jitaccel.apply(clone, preset, on_unsupported=on_unsupported)  # type: ignore[arg-type]
        return (clone,)


class JiTSigmas:
    """Returns a preset's noise levels, for *SamplerCustomAdvanced* and the like."""

    CATEGORY = "jitaccel"
    DESCRIPTION = "The noise levels that a preset of jitaccel is tuned for. Set steps to 0 for the preset's own number."
    FUNCTION = "sigmas"
    RETURN_TYPES = ("SIGMAS",)
    RETURN_NAMES = ("sigmas",)
    _DENOISE: ClassVar[dict[str, Any]] = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the node's inputs."""
        return {
            "required": {
                "preset": (list(_PRESETS), {"default": _DEFAULT}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000}),
                "denoise": ("FLOAT", cls._DENOISE),
            }
        }

    def sigmas(self, preset: str, steps: int, denoise: float) -> tuple[Tensor]:
        """Returns the levels (steps + 1,) in float32; with denoise below 1, the last ones of a finer list."""
        config = jitaccel.PRESETS[preset]
        count = steps or config.steps
        assert isinstance(count, int)
        if denoise <= 0.0:
            return (torch.zeros(0, dtype=torch.float32, device="cpu"),)
        levels = jitaccel.noise_levels(config, int(count / denoise))
        return (torch.tensor(levels[-(count + 1) :], dtype=torch.float32, device="cpu"),)


NODE_CLASS_MAPPINGS = {"JiTApply": JiTApply, "JiTSigmas": JiTSigmas}
NODE_DISPLAY_NAME_MAPPINGS = {"JiTApply": "JiT Apply", "JiTSigmas": "JiT Sigmas"}
