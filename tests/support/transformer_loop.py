"""A custom Euler loop around a tiny FLUX transformer, with levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig, noise_levels
from tests.support import reference, tiny
from tests.support.tiny import GRID, SHORT, generate

SCALE = 3.0
LEVELS = {name: noise_levels(config) for name, config in PRESETS.items() if name != "dense"}
UNIFORM = tuple(1.0 - i / 16 for i in range(17))
GEOMETRIC = (*(0.85**i for i in range(24)), 0.0)
SHIFTED = tuple(3.0 * s / (1.0 + 2.0 * s) for s in (1.0 - i / 28 for i in range(29)))
CLEAN = SHORT.replace(lifter="clean", micro_flow="none")
EXACT = PRESETS["7x-paper"].replace(micro_flow="exact")


class Loop:
    """A custom sampler: the network, the texts, and Euler steps, with gradients if `has_gradients`."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.has_gradients = False
        self.pipe = tiny.pipeline()
        encode = self.pipe.encode_prompt
        texts = [encode(text, None, max_sequence_length=tiny.TEXT_TOKENS) for text in ("a red circle", "blue square")]
        self.model, self.dtype = self.pipe.transformer, dtype
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.texts = [tuple(part.to(dtype) for part in text) for text in texts]

    def velocity(self, state: Tensor, level: float, text: int | str = 0, grid: tuple[int, int] = GRID) -> Tensor:
        """Returns the velocity for the prompt (`text` 0), the negative prompt (1), or a batch [neg, pos] ("both")."""
        embeds, pooled, text_ids = self.texts[text if isinstance(text, int) else 0]
        if text == "both":
            embeds, pooled = (torch.cat([self.texts[1][part], self.texts[0][part]]) for part in (0, 1))
        batch = state.shape[0]
        with torch.set_grad_enabled(self.has_gradients):
            velocity: Tensor = self.model(
                hidden_states=state,
                encoder_hidden_states=embeds.expand(batch, -1, -1),
                pooled_projections=pooled.expand(batch, -1),
                timestep=(torch.tensor([level * 1000.0]).to(self.dtype) / 1000).expand(batch),
                img_ids=tiny.ids(grid).to(self.dtype),
                txt_ids=text_ids,
                guidance=torch.full([batch], 3.5),
                return_dict=False,
            )[0]
        return velocity

    def guided(self, state: Tensor, level: float, order: str) -> Tensor:
        """Returns the guided velocity; `order` is that of the guidance branches, "none" for no guidance."""
        if order == "none":
            return self.velocity(state, level)
        if order == "batch":
            negative, positive = self.velocity(torch.cat([state, state]), level, "both").chunk(2)
        elif order == "positive first":
            positive, negative = self.velocity(state, level, 0), self.velocity(state, level, 1)
        else:
            negative, positive = self.velocity(state, level, 1), self.velocity(state, level, 0)
        return negative + SCALE * (positive - negative)

    def run(
        self,
        levels: Sequence[float],
        state: Tensor,
        order: str = "none",
        steps: int | None = None,
        in_place: bool = False,
    ) -> list[Tensor]:
        """Returns the state after each of the first `steps` steps."""
        state = state.to(self.dtype)
        if in_place:
            state = state.clone()
        states = []
        for level, next_level in list(pairwise(levels))[:steps]:
            velocity = self.guided(state, level, order)
            if in_place:
                state.add_(velocity, alpha=next_level - level)
            else:
                state = (state.float() + (next_level - level) * velocity.float()).to(self.dtype)
            states.append(state.clone())
        return states


def through_pipeline(config: JiTConfig | str, seed: int = 0, dtype: torch.dtype = torch.float32, **call: Any) -> Tensor:
    """Returns the result of the pipeline route from the same start."""
    loop = Loop(dtype)
    embeds, pooled, _ = loop.texts[0]
    if call:
        call = {**call, "negative_prompt_embeds": loop.texts[1][0], "negative_pooled_prompt_embeds": loop.texts[1][1]}
    start = tiny.start(seed).to(dtype)
    with jitaccel.apply(loop.pipe, config):
        return generate(
            loop.pipe, prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, latents=start, **call
        )


def network_of(loop: Loop) -> reference.Velocity:
    """Returns the unpatched network as the reference calls it."""
    embeds, pooled, text_ids = loop.texts[0]

    def run(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        with torch.no_grad():
            velocity: Tensor = loop.model(
                hidden_states=tokens,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=torch.tensor([level * 1000.0]) / 1000,
                img_ids=tiny.ids()[anchors],
                txt_ids=text_ids,
                guidance=torch.tensor([3.5]),
                return_dict=False,
            )[0]
        return velocity

    return run


def on_small_grid(velocity: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: velocity(*args, grid=(6, 6))
