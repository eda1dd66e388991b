"""The data type that describes a model family: where its tokens can be cut, how it takes latents and levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from jitaccel.errors import UnsupportedModelError

from ..cutting import Adapter
from ..layout import Layout

Arguments = Mapping[str, Any]
"""The arguments of one call of a transformer, by name."""
Config = Mapping[str, Any]
"""The configuration of a transformer."""


def nothing_forced(config: Config, arguments: Arguments) -> Tensor | None:
    """Returns None: no token is required to be an anchor."""
    return None


def nothing_resized(arguments: Arguments, grid: tuple[int, ...]) -> Arguments:
    """Returns no arguments: the latents alone determine the grid."""
    return {}


def no_fill(config: Config, grid: tuple[int, ...]) -> int:
    """Returns 0: the tokens of a grid are all that the model looks at."""
    return 0


def no_problem(config: Config) -> str | None:
    """Returns None: every configuration can be accelerated."""
    return None


def _same(x: Any) -> Any:
    return x


@dataclass(frozen=True, kw_only=True)
class Words:
    """Translates the calls of a model that does not take the tensors `hidden_states` and `timestep`.

    Attributes:
        read: Converts the model's arguments to ones with `hidden_states` (B, ...) and `timestep`.
        write: The inverse of `read`.
        tensor: Converts the model's result to a tensor (B, ...) in the layout of `hidden_states`.
        returned: The inverse of `tensor`.
    """

    read: Callable[[Arguments], Arguments]
    write: Callable[[Arguments], Arguments]
    tensor: Callable[[Any], Tensor] = _same
    returned: Callable[[Tensor], Any] = _same


PLAIN = Words(read=_same, write=_same)
"""The translation for most models, which changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One transformer class, and the pipelines that run it.

    Attributes:
        name: The class of the transformer.
        pipelines: Classes of pipelines whose whole generations are tested.
        adapter: Where its tokens are cut and put back.
        layout: How latents hold tokens, from the configuration.
        grid: The token grid of a call, (h, w) or (t, h, w), from configuration and arguments.
        channels: Number of generated channels in the latents, from the configuration; further channels are conditions.
        words: Translates its calls if they do not take `hidden_states` and `timestep`.
        per_level: The value of `timestep` at noise level 1, or at level 0 if inverted.
        is_inverted: Whether `timestep` rises while noise falls.
        sign: Factor that turns the output into a velocity (noise minus data).
        inverts_levels: Whether its pipelines' scheduler uses the output unchanged, on levels that rise from 0 to 1
            (`invert_sigmas`).
        spacings: Levels that its pipelines may request from their scheduler, by number of steps, in addition to evenly
            spaced ones.
        frames: The meaning of the first axis of a grid (t, h, w); None if all grids are (h, w).
        branches: How pipelines pass guidance branches: in separate calls, or as images of one batch ("batch").
        forced: The tokens (B, N) bool that are always anchors, such as a given frame, from configuration and arguments;
            returns None if there are none.
        text: Arguments (B, T, E), or (L, B, T, E), of text and other conditions whose lengths T statistics count.
        schedule: The noise levels of presets given by name: the sampler's own ("native"), or the paper's ("beta").
        beside: Arguments that are latents in the same layout and only conditions, such as a control video.
        levels: Arguments that hold the noise level of the generated tokens, including `timestep`.
        result: Makes the result of a call from all its tensors if it is a dict; None for a `Transformer2DModelOutput`.
        resized: Returns the arguments that describe a grid, changed to another grid; arguments that follow from the
            shape of the latents are not needed.
        refused: Arguments that cannot be accelerated, with a description for messages.
        cost: Operations of one forward for one image, from configuration, image and text tokens. None counts them on a
            copy without data (`flops.py`), which is not possible for a model that reads values.
        fill: Number of tokens that the model adds to those of a grid, from configuration and grid.
        blocks: Lists of blocks that `compile` compiles one by one because the whole forward cannot be traced. If empty,
            the whole forward is one graph.
        uncompiled: Why no part of it is compiled; None if its blocks or its whole forward are.
        captures: Whether a compiled stage can be recorded as a CUDA graph, which is not possible if the forward reads
            values.
        divides: Whether it was tested with tokens divided among ranks.
        divides_text: Whether ranks divide the text too.
        problem: Returns why a transformer of this class cannot be accelerated, from its configuration; None if it can.
    """

    name: str
    pipelines: tuple[str, ...]
    adapter: Adapter
    layout: Callable[[Config], Layout]
    grid: Callable[[Config, Arguments], tuple[int, ...]]
    channels: Callable[[Config], int]
    words: Words = PLAIN
    per_level: float = 1000.0
    is_inverted: bool = False
    sign: Literal[1, -1] = 1
    inverts_levels: bool = False
    spacings: tuple[Callable[[int], Sequence[float]], ...] = ()
    frames: Literal["time", "layers"] | None = None
    branches: Literal["calls", "batch"] = "calls"
    forced: Callable[[Config, Arguments], Tensor | None] = nothing_forced
    text: tuple[str, ...] = ("encoder_hidden_states",)
    schedule: Literal["native", "beta"] = "native"
    beside: tuple[str, ...] = ()
    levels: tuple[str, ...] = ("timestep",)
    result: Callable[..., object] | None = None
    resized: Callable[[Arguments, tuple[int, ...]], Arguments] = nothing_resized
    refused: Mapping[str, str] = field(default_factory=dict)
    cost: Callable[[Config, int, int], int] | None = None
    fill: Callable[[Config, tuple[int, ...]], int] = no_fill
    blocks: tuple[str, ...] = ()
    uncompiled: str | None = None
    captures: bool = True
    divides: bool = False
    divides_text: bool = False
    problem: Callable[[Config], str | None] = no_problem

    def timestep_like(self, timestep: Tensor, level: float) -> Tensor:
        """Returns `timestep` set to a noise level, in its shape and dtype. Zeros, which mark a given frame, stay."""
        given = self.per_level * (1.0 - level if self.is_inverted else level)
        if self.is_inverted:
            return torch.full_like(timestep, given)
        return torch.where(timestep == 0, timestep, torch.full_like(timestep, given))

    def num_text(self, arguments: Arguments) -> int:
        """Returns the number of tokens of text and other conditions in a call."""
        found = (arguments[name] for name in self.text if arguments.get(name) is not None)
        return sum(each[0].shape[-2] for each in found)

    def noise_level(self, arguments: Arguments) -> float:
        """Returns the noise level of a call; the highest if every token has a timestep. Waits for the device.

        Raises:
            UnsupportedModelError: If the images are at different levels.
            ValueError: If the timestep is not a noise level.
        """
        timestep = arguments["timestep"].detach().double()
        each = timestep.flatten(1).amax(dim=1) if timestep.ndim > 1 else timestep.reshape(-1)
        shares = [level / self.per_level for level in each.tolist()]
        levels = [1.0 - share for share in shares] if self.is_inverted else shares
        if any(level != levels[0] for level in levels):
            raise UnsupportedModelError(
                f"jitaccel: timestep must be one noise level for the whole batch, got {levels}; call image by image"
            )
        if not 0.0 < levels[0] <= 1.0:
            ends = f"[0, {self.per_level:g})" if self.is_inverted else f"(0, {self.per_level:g}]"
            raise ValueError(
                f"jitaccel: timestep must be in {ends}, got {shares[0] * self.per_level:g}; "
                f"give {'1 minus ' if self.is_inverted else ''}the noise level times {self.per_level:g}"
            )
        return float(levels[0])


def channels_out(config: Config) -> int:
    """Returns the number of channels in a transformer's output."""
    return int(config.get("out_channels") or config["in_channels"])
