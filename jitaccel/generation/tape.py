"""Recording for a report: state and clean estimate of one image at each step, stored on request."""

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
        state: (N, D), the state at the start of the step.
        clean: (N, D), the clean estimate (x0) by the velocity of the step.
    """

    step: Step
    state: Tensor
    clean: Tensor


class Tape:
    """Records the steps of one image while a generation runs. It only reads; the picture is the same bit for bit.

    A custom loop may call the network once per guidance branch; then the first call of a step is recorded.

    Attributes:
        image: Index of the image in the batch.
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
        """Stores copies of a step. Waits for the device.

        Args:
            step: The step.
            state: (B, N, D), the state at its start.
            velocity: (B, N, D), the velocity at every token.
            corrected: (B, N, D), the velocity of the sampler's Euler step, with the solver's correction.
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
