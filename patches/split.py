"""What of a call's image tokens is generated, and what a model is only shown beside it.

Reference tokens stand after the generated ones (Kontext, FLUX.2), and further channels beside those of the state (Fill,
Control). References stay dense; further channels go with their tokens.
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
    """What enters the network of what is given for every token: of a run, or of several branches in one batch."""

    def show(self, state: Tensor) -> Tensor: ...

    def show_beside(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Branches:
    """A run's anchors, `count` times one after the other: branches of guidance that come as images of one batch."""

    run: Run
    count: int

    @property
    def is_dense(self) -> bool:
        """Whether every token is an anchor."""
        return self.run.is_dense

    @property
    def anchors(self) -> Tensor:
        """The tokens of every image of the batch, (count * B, M)."""
        return self.run.anchors.repeat(self.count, 1)

    @property
    def positions(self) -> Tensor:
        """Which position ids of the whole picture the tokens of every image of the batch have, (count * B, M)."""
        return self.run.plan.positions.repeat(self.count, 1)

    def show(self, state: Tensor) -> Tensor:
        """Returns what the network sees of a state (count * B, N, D)."""
        return self.run.show(state)

    def show_beside(self, x: Tensor) -> Tensor:
        """Returns what the network sees of latents beside the state, (count * B, N, C)."""
        return self.run.show_beside(x)

    def show_features(self, x: Tensor) -> Tensor:
        """Returns what the network sees of features of whole tokens, (count * B, N, C)."""
        return self.run.show_features(x)

    def gather(self, x: Tensor) -> Tensor:
        """Returns the anchors' tokens of `x` (count * B, N, ...)."""
        return x if self.is_dense else gather_tokens(x, self.anchors)

    def scatter(self, values: Tensor) -> Tensor:
        """Returns `values` (count * B, M, ...) in place among zeros, (count * B, N, ...)."""
        return values if self.is_dense else scatter_tokens(values, self.anchors, num_tokens_of(self.run.grid))


@dataclass(frozen=True, eq=False)
class Split:
    """hidden: (B, S, C), all that a model is given of images. num_tokens, channels: N and D, which come first in it."""

    hidden: Tensor
    num_tokens: int
    channels: int

    @property
    def state(self) -> Tensor:
        """What is generated, (B, N, D); the very tensor where that is all."""
        is_all = self.num_tokens == self.hidden.shape[1] and self.channels == self.hidden.shape[2]
        return self.hidden if is_all else self.hidden[:, : self.num_tokens, : self.channels]

    @property
    def num_references(self) -> int:
        """How many reference tokens there are."""
        return self.hidden.shape[1] - self.num_tokens

    @property
    def extra(self) -> Tensor | None:
        """The further channels of generated tokens, (B, N, C - D)."""
        if self.channels == self.hidden.shape[2]:
            return None
        return self.hidden[:, : self.num_tokens, self.channels :]

    @property
    def references(self) -> Tensor | None:
        """The reference tokens, (B, R, C)."""
        return self.hidden[:, self.num_tokens :] if self.num_references else None

    def tokens(self, places: Viewer, state: Tensor) -> Tensor:
        """Returns what enters the network, (B, M + R, C): of a state (B, N, D), and what is shown beside it."""
        extra = None if self.extra is None else places.show_beside(self.extra)
        return beside(places.show(state), extra, self.references)

    def entering(self, pick: Callable[[Tensor], Tensor], x: Tensor, before: int = 0) -> Tensor:
        """Returns of `x` (B, before + S, ...), given for every token, what belongs to those that enter the network.

        pick: what is taken of generated tokens: `gather` of places for masks, `show_beside` for latents,
        `show_features` for residuals. before: how many entries of text come first; they stay, as references do.
        """
        text, image = x[:, :before], x[:, before:]
        parts = (text, pick(image[:, : self.num_tokens].contiguous()), image[:, self.num_tokens :])
        return torch.cat([part for part in parts if part.shape[1]], dim=1)

    def ids_at(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """Returns the position ids (M + R, A) at `positions` (M,) among those of every token (S, A); None for all."""
        if positions is None:
            return ids
        return torch.cat([ids[: self.num_tokens][positions], ids[self.num_tokens :]])

    def whole(self, velocity: Tensor) -> Tensor:
        """Returns a velocity (B, N, D) as a model does, (B, S, D): zeros at references, which nobody reads."""
        if not self.num_references:
            return velocity
        return torch.cat([velocity, velocity.new_zeros(len(velocity), self.num_references, self.channels)], dim=1)


def beside(tokens: Tensor, extra: Tensor | None, references: Tensor | None) -> Tensor:
    """Returns tokens (B, M, D) with their further channels, and references after them."""
    if extra is not None:
        tokens = torch.cat([tokens, extra], dim=2)
    return tokens if references is None else torch.cat([tokens, references], dim=1)
