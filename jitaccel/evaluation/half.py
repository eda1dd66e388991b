"""A simple baseline: the first steps at half the size, that is, on a quarter of the tokens, the others at full size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CommandError
from ..method.presets import PRESETS
from ..method.schedule import beta_levels
from ..patches.diffusers_private import has_packed_latents, pack_latents, unpack_latents
from .comparison import Method, TimedCall, generate


@dataclass(frozen=True, kw_only=True)
class HalfFirst:
    """`steps` dense steps on the levels of the presets, the first `half_steps` at half the height and width.

    The last half-size step goes to level 0, Euler's clean estimate. This is upsampled bicubically in the autoencoder's
    space, and noised again to the level where the remaining steps start. No decision depends on the content of an
    image, so batches need no special treatment. Fresh noise comes from the caller's generator.
    """

    steps: int
    half_steps: int

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that distinguish two such methods, as JSON values."""
        return {"rival": "half", "steps": self.steps, "half_steps": self.half_steps, "upsampling": "bicubic"}

    def __call__(self, pipe: Any, on_step: Callable[[], object] | None, call: Mapping[str, Any]) -> TimedCall:
        """Returns what `pipe(**call)` makes. whole_s includes text encoding twice, because it runs twice.

        Raises CommandError for a height or width whose half is not in whole tokens, and for pipelines of other models.
        """
        if not has_packed_latents(pipe):
            raise CommandError(f"half must have a pipeline of FLUX.1, got {type(pipe).__name__}")
        height, width = _size(pipe, call)
        levels = beta_levels(self.steps)
        small_call = {**call, "height": height // 2, "width": width // 2, "output_type": "latent"}
        small = _on_levels(pipe, (*levels[: self.half_steps], 0.0), on_step, small_call)
        level = levels[self.half_steps]
        latents = _renoised(pipe, small.pictures, (height, width), level, call.get("generator"))
        large_call = {**call, "height": height, "width": width, "latents": latents}
        large = _on_levels(pipe, levels[self.half_steps :], on_step, large_call)
        return TimedCall(
            pictures=large.pictures,
            denoise_s=small.denoise_s + large.denoise_s,
            whole_s=small.whole_s + large.whole_s,
            flops=small.flops + large.flops,
            token_steps=small.token_steps + large.token_steps,
            stats=None,
        )


def _size(pipe: Any, call: Mapping[str, Any]) -> tuple[int, int]:
    """Returns height and width in pixels."""
    default = pipe.default_sample_size * pipe.vae_scale_factor
    height, width = (int(call.get(name) or default) for name in ("height", "width"))
    unit = 2 * 2 * pipe.vae_scale_factor  # a token is two latents wide, and half the size must be whole tokens
    if height % unit or width % unit:
        raise CommandError(f"half needs a height and width that are multiples of {unit}, got {height} and {width}")
    return height, width


def _on_levels(
    pipe: Any, levels: tuple[float, ...], on_step: Callable[[], object] | None, call: Mapping[str, Any]
) -> TimedCall:
    config = PRESETS["dense"].replace(steps=len(levels) - 1, schedule=levels)
    return generate(pipe, Method(name="half", steps=len(levels) - 1, config=config), on_step, **call)


def _renoised(pipe: Any, clean: torch.Tensor, size: tuple[int, int], level: float, generator: Any) -> torch.Tensor:
    """Returns packed latents (B, N, D) of a picture of `size` pixels, from a clean estimate of half that size."""
    from diffusers.utils.torch_utils import randn_tensor

    height, width = size
    small = unpack_latents(pipe, clean, height // 2, width // 2)
    large = torch.nn.functional.interpolate(small.float(), scale_factor=2.0, mode="bicubic", align_corners=False)
    noise = randn_tensor(large.shape, generator=generator, device=clean.device, dtype=clean.dtype)
    noisy = (1.0 - level) * large + level * noise.float()
    return pack_latents(pipe, noisy.to(clean.dtype))
