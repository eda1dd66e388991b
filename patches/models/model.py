"""What a family of models is, as data: where its tokens can be cut, how it takes latents and levels."""

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
    """Returns None: no token has to be an anchor."""
    return None


def nothing_resized(arguments: Arguments, grid: tuple[int, ...]) -> Arguments:
    """Returns no arguments: all that depends on a grid follows from the latents."""
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
    """How a call of a model that takes no tensors `hidden_states` and `timestep` is put in these words, and back.

    Attributes:
        read: The arguments as the model takes them -> with `hidden_states` (B, ...) and `timestep`.
        write: The reverse.
        tensor: What the model returns -> (B, ...), in the layout of `hidden_states`.
        returned: The reverse.
    """

    read: Callable[[Arguments], Arguments]
    write: Callable[[Arguments], Arguments]
    tensor: Callable[[Any], Tensor] = _same
    returned: Callable[[Tensor], Any] = _same


PLAIN = Words(read=_same, write=_same)
"""Those of most models."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One transformer class, and the pipelines that run it.

    Attributes:
        name: The class of the transformer.
        pipelines: Classes of pipelines whose whole generations are tested.
        adapter: Where its tokens are cut and put back.
        layout: How latents hold tokens, by configuration.
        grid: The token grid of a call, by configuration and arguments: (h, w), or (t, h, w).
        channels: How many channels of the latents are generated, by configuration; what a model is given beyond them
            are conditions.
        words: How its calls are put, where they have no `hidden_states` and `timestep`.
        per_level: What `timestep` is at noise level 1; inverted, at level 0.
        is_inverted: Whether `timestep` rises while noise falls.
        sign: What the output is multiplied by to be a velocity, noise minus data.
        inverts_levels: Whether the scheduler of its pipelines follows the output as it is on levels that rise from 0 to
            1 (`invert_sigmas`).
        spacings: Levels that its pipelines ask of their scheduler, by the number of steps, besides evenly spaced ones.
        frames: What the first axis of a grid (t, h, w) is; None where all grids are (h, w).
        branches: How pipelines bring the branches of guidance: in a call each, or as images of one batch ("batch").
        forced: The tokens (B, N) bool that are anchors whatever comes (a frame that is given), by configuration and
            arguments; or None.
        text: Arguments (B, T, E), or (L, B, T, E), of text and other conditions, whose lengths T statistics count.
        schedule: The noise levels of presets that are named: the sampler's own ("native"), or the paper's ("beta").
        beside: Arguments of latents in the same layout, all of them conditions (a control video).
        levels: Arguments at the noise level of what is generated, `timestep` among them.
        result: What a call returns whose output is a dict, of all its tensors; None for a `Transformer2DModelOutput`.
        resized: Arguments that tell a grid, of another grid, by arguments; what follows from the shape of latents needs
            none.
        refused: Arguments that cannot be accelerated, and what they are.
        cost: Operations of one forward for one image, by configuration, image and text tokens; None counts them on a
            copy without data (`flops.py`), which a model that looks at values does not allow.
        fill: Tokens that the model adds to those of a grid, by configuration and grid.
        blocks: Lists of blocks that `compile` compiles one by one, where the forward around them does not trace; empty:
            the whole forward is one graph.
        uncompiled: Why nothing of it is compiled; None where its blocks are, or the whole forward.
        captures: Whether a compiled stage can be recorded as a CUDA graph; not where its forward looks at values.
        divides: Whether it was tried with tokens divided among ranks.
        divides_text: Whether ranks divide the text too.
        problem: Why a transformer of this class cannot be accelerated, by configuration; None where it can.
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
        """Returns the `timestep` of a noise level in shape and dtype of a call's own; one of 0, of a frame that is
        given, stays."""
        given = self.per_level * (1.0 - level if self.is_inverted else level)
        if self.is_inverted:
            return torch.full_like(timestep, given)
        return torch.where(timestep == 0, timestep, torch.full_like(timestep, given))

    def num_text(self, arguments: Arguments) -> int:
        """Returns how many tokens of text and other conditions a call has."""
        found = (arguments[name] for name in self.text if arguments.get(name) is not None)
        return sum(each[0].shape[-2] for each in found)

    def noise_level(self, arguments: Arguments) -> float:
        """Returns the noise level of a call; of a timestep for every token the highest. Waits for the device.

        Raises:
            UnsupportedModelError: For images at different levels.
            ValueError: For what is no level.
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
    """Returns how many channels a transformer generates: those of its output."""
    return int(config.get("out_channels") or config["in_channels"])
