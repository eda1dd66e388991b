"""What a report needs of a generation: state and clean estimate of one image at each step, kept when asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..method.steps import Step


@dataclass(frozen=True, eq=False, kw_only=True)
class Frame:
    """One step of one image, in float16 on the CPU.

    Attributes:
        step: The step.
        state: (N, D), the state that the step starts from.
        clean: (N, D), the clean estimate (x0) that follows from the velocity of the step.
    """

    step: Step
    state: Tensor
    clean: Tensor


class Tape:
    """Keeps the steps of one image while a generation runs. It only reads: the picture stays the same, bit for bit.

    A custom loop may call the network once for each branch of guidance; the first call of a step is kept then.

    Attributes:
        image: Which image of the batch.
        grid: The token grid.
        patch: Latents along a token's side.
        final: (N, D), the state after the last step seen; None before the first.
    """

    def __init__(self, image: int, batch: int, grid: tuple[int, ...], patch: int) -> None:
        if image >= batch:
            raise ConfigError(
                f"Handle.record: image must be below the batch of {batch}, got {image}; the first image is 0"
            )
        self.image, self.grid, self.patch = image, grid, patch
        self.final: Tensor | None = None
        self._frames: dict[int, Frame] = {}

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The steps seen so far, in order."""
        return tuple(frame for _, frame in sorted(self._frames.items()))

    @torch.no_grad()
    def see(self, step: Step, state: Tensor, velocity: Tensor, corrected: Tensor) -> None:
        """Keeps copies of a step. Waits for the device.

        Args:
            step: The step.
            state: (B, N, D), what it started from.
            velocity: (B, N, D), the velocity at every token.
            corrected: (B, N, D), the velocity that the sampler's Euler step takes, with the solver's correction.
        """
        if step.index in self._frames:
            return
        before, flow, taken = (x[self.image].float() for x in (state, velocity, corrected))
        clean = before - step.noise_level * flow
        after = before + (step.next_level - step.noise_level) * taken
        self._frames[step.index] = Frame(step=step, state=_kept(before), clean=_kept(clean))
        self.final = _kept(after)


def _kept(x: Tensor) -> Tensor:
    return x.to("cpu", torch.float16, copy=True)
