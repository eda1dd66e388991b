"""Separates a call's generated image tokens from reference tokens and conditioning channels.

Reference tokens follow the generated ones (Kontext, FLUX.2). Conditioning channels follow the channels of the state
(Fill, Control). References stay dense; conditioning channels are cut together with their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jitaccel.method.grid import num_tokens_of
from jitaccel.method.run import Run
from jitaccel.tokens import gather_tokens, scatter_tokens


class Viewer(Protocol):
    """Selects what enters the network from values given for every token, for a run or for branches in one batch."""

    def show(self, state: Tensor) -> Tensor: ...

    def show_beside(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Branches:
    """A run's anchors, repeated `count` times for guidance branches that come as images of one batch."""

    run: Run
    count: int

    @property
    def is_dense(self) -> bool:
        """Whether every token is an anchor."""
        return self.run.is_dense

    @property
    def anchors(self) -> Tensor:
        """The anchors of every image of the batch, (count * B, M)."""
        return self.run.anchors.repeat(self.count, 1)

    @property
    def positions(self) -> Tensor:
        """Indices into the whole picture's position ids, for every image of the batch, (count * B, M)."""
        return self.run.plan.positions.repeat(self.count, 1)

    def show(self, state: Tensor) -> Tensor:
        """Returns the part of a state (count * B, N, D) that the network sees."""
        return self.run.show(state)

    def show_beside(self, x: Tensor) -> Tensor:
        """Returns the part of conditioning latents (count * B, N, C) that the network sees."""
        return self.run.show_beside(x)

    def show_features(self, x: Tensor) -> Tensor:
        """Returns the part of token features (count * B, N, C) that the network sees."""
        return self.run.show_features(x)

    def gather(self, x: Tensor) -> Tensor:
        """Returns the anchors' tokens of `x` (count * B, N, ...)."""
        return x if self.is_dense else gather_tokens(x, self.anchors)

    def scatter(self, values: Tensor) -> Tensor:
        """Returns `values` (count * B, M, ...) scattered among zeros, (count * B, N, ...)."""
        return values if self.is_dense else scatter_tokens(values, self.anchors, num_tokens_of(self.run.grid))


@dataclass(frozen=True, eq=False)
class Split:
    """A model's image input, split into its parts.

    Attributes:
        hidden: (B, S, C), the whole image input.
        num_tokens: N, the number of generated tokens, which come first.
        channels: D, the number of generated channels, which come first.
    """

    hidden: Tensor
    num_tokens: int
    channels: int

    @property
    def state(self) -> Tensor:
        """The generated part, (B, N, D); `hidden` itself if there is no other part."""
        is_all = self.num_tokens == self.hidden.shape[1] and self.channels == self.hidden.shape[2]
        return self.hidden if is_all else self.hidden[:, : self.num_tokens, : self.channels]

    @property
    def num_references(self) -> int:
        """Number of reference tokens."""
        return self.hidden.shape[1] - self.num_tokens

    @property
    def extra(self) -> Tensor | None:
        """The conditioning channels of the generated tokens, (B, N, C - D); None without any."""
        if self.channels == self.hidden.shape[2]:
            return None
        return self.hidden[:, : self.num_tokens, self.channels :]

    @property
    def references(self) -> Tensor | None:
        """The reference tokens, (B, R, C); None without any."""
        return self.hidden[:, self.num_tokens :] if self.num_references else None

    def tokens(self, places: Viewer, state: Tensor) -> Tensor:
        """Returns the network's image input (B, M + R, C) for a state (B, N, D), conditions and references included."""
        extra = None if self.extra is None else places.show_beside(self.extra)
        return beside(places.show(state), extra, self.references)

    def entering(self, pick: Callable[[Tensor], Tensor], x: Tensor, before: int = 0) -> Tensor:
        """Returns the entries of `x` (B, before + S, ...) that belong to tokens entering the network.

        Args:
            pick: Selects the entries of generated tokens: `gather` for masks, `show_beside` for latents,
                `show_features` for residuals.
            x: Values for every token.
            before: Number of text entries at the start; they stay, as do references.
        """
        text, image = x[:, :before], x[:, before:]
        parts = (text, pick(image[:, : self.num_tokens].contiguous()), image[:, self.num_tokens :])
        return torch.cat([part for part in parts if part.shape[1]], dim=1)

    def ids_at(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """Returns the position ids (M + R, A) at `positions` (M,), or all if None, from those of every token (S, A)."""
        if positions is None:
            return ids
        return torch.cat([ids[: self.num_tokens][positions], ids[self.num_tokens :]])

    def whole(self, velocity: Tensor) -> Tensor:
        """Returns a velocity (B, N, D) in a model's shape, (B, S, D), with zeros at references, which nobody reads."""
        if not self.num_references:
            return velocity
        return torch.cat([velocity, velocity.new_zeros(len(velocity), self.num_references, self.channels)], dim=1)


def beside(tokens: Tensor, extra: Tensor | None, references: Tensor | None) -> Tensor:
    """Returns tokens (B, M, D) with `extra` channels appended, followed by reference tokens."""
    if extra is not None:
        tokens = torch.cat([tokens, extra], dim=2)
    return tokens if references is None else torch.cat([tokens, references], dim=1)
