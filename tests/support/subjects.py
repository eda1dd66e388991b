"""Every FLUX transformer in a custom loop, with its calls and the method by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import jitaccel
from tests.support import tiny
from tests.support.models import chroma_transformer, flux2_transformer, noise
from tests.support.tiny import CHANNELS, NUM_TOKENS, SHORT, TEXT_TOKENS, WIDTH

LEVELS = jitaccel.noise_levels(SHORT)


@dataclass(frozen=True)
class Subject:
    """One way to call a model.

    `arguments` are those that do not depend on the subset of tokens. `extra` is (N, E), `references` (R, C) with their
    ids, `masks` (T + N + R,) by name, and `residuals` (N + R, width) by name.
    """

    model: Any
    arguments: dict[str, Any]
    ids: Tensor
    extra: Tensor | None = None
    references: Tensor | None = None
    reference_ids: Tensor | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[str, list[Tensor]] = field(default_factory=dict)

    def velocity(self, tokens: Tensor, at: Tensor, level: float) -> Tensor:
        """Calls the model by hand on tokens (1, M, D) at these raster indices, with all inputs cut to them."""
        num_references = 0 if self.references is None else len(self.references)
        hidden, ids = tokens[0], self.ids[at]
        if self.extra is not None:
            hidden = torch.cat([hidden, self.extra[at]], dim=1)
        if self.references is not None and self.reference_ids is not None:
            hidden, ids = torch.cat([hidden, self.references]), torch.cat([ids, self.reference_ids])
        rows = torch.cat([at, NUM_TOKENS + torch.arange(num_references)])
        text = torch.arange(TEXT_TOKENS)
        out = self.model(
            hidden_states=hidden[None],
            img_ids=ids,
            timestep=torch.tensor([level]),
            **{name: mask[torch.cat([text, TEXT_TOKENS + rows])][None] for name, mask in self.masks.items()},
            **{name: [x[rows][None] for x in several] for name, several in self.residuals.items()},
            **self.arguments,
            return_dict=False,
        )[0]
        return out[:, : len(at)]

    def loop(self, state: Tensor, batch: int = 1) -> Tensor:
        """Runs an Euler loop that calls the model with all inputs, like its users."""
        ids = self.ids if self.reference_ids is None else torch.cat([self.ids, self.reference_ids])
        for level, after in itertools.pairwise(LEVELS):
            hidden = state if self.extra is None else torch.cat([state, self.extra.expand(batch, -1, -1)], dim=2)
            if self.references is not None:
                hidden = torch.cat([hidden, self.references.expand(batch, -1, -1)], dim=1)
            out = self.model(
                hidden_states=hidden,
                img_ids=ids,
                timestep=torch.full((batch,), level),
                **{name: mask.expand(batch, -1) for name, mask in self.masks.items()},
                **{name: [x.expand(batch, -1, -1) for x in several] for name, several in self.residuals.items()},
                **{name: _of_batch(value, name, batch) for name, value in self.arguments.items()},
                return_dict=False,
            )[0]
            assert out.shape[:2] == hidden.shape[:2]
            state = state + (after - level) * out[:, :NUM_TOKENS]
        return state


def _of_batch(value: Any, name: str, batch: int) -> Any:
    is_row = isinstance(value, Tensor) and name != "txt_ids"
    return value.expand(batch, *value.shape[1:]) if is_row else value


def flux_subject(**parts: Any) -> Subject:
    parts.setdefault("model", tiny.transformer())
    arguments = {
        "encoder_hidden_states": noise(1, 1, TEXT_TOKENS, WIDTH),
        "pooled_projections": noise(2, 1, WIDTH),
        "guidance": torch.tensor([3.5]),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }
    return Subject(arguments=arguments, ids=tiny.ids(), **parts)


def _kontext() -> Subject:
    ids = tiny.ids((5, 4))
    ids[:, 0] = 1
    return flux_subject(references=noise(3, 20, CHANNELS), reference_ids=ids)


def _channels(extra: int) -> Subject:
    model = tiny.transformer(in_channels=CHANNELS + extra, out_channels=CHANNELS)
    return flux_subject(model=model, extra=noise(4, NUM_TOKENS, extra))


def _controlnet() -> Subject:
    residuals = {
        "controlnet_block_samples": [noise(5, NUM_TOKENS, WIDTH)],
        "controlnet_single_block_samples": [noise(6, NUM_TOKENS, WIDTH)],
    }
    return flux_subject(residuals=residuals)


def _flux2(**parts: Any) -> Subject:
    ids = torch.cat([tiny.ids(), torch.zeros(NUM_TOKENS, 1)], dim=1).long()
    text_ids = torch.zeros(TEXT_TOKENS, 4, dtype=torch.int64)
    text_ids[:, 3] = torch.arange(TEXT_TOKENS)
    arguments = {
        "encoder_hidden_states": noise(1, 1, TEXT_TOKENS, WIDTH), "guidance": torch.tensor([3.5]), "txt_ids": text_ids,
    }  # fmt: skip
    return Subject(model=flux2_transformer(), arguments=arguments, ids=ids, **parts)


def _flux2_references() -> Subject:
    ids = torch.cat([tiny.ids((5, 4)), torch.zeros(20, 1)], dim=1).long()
    ids[:, 0] = 10
    return _flux2(references=noise(3, 20, CHANNELS), reference_ids=ids)


def _chroma() -> Subject:
    mask = torch.ones(TEXT_TOKENS + NUM_TOKENS)
    mask[5:TEXT_TOKENS] = 0.0
    arguments = {"encoder_hidden_states": noise(1, 1, TEXT_TOKENS, WIDTH), "txt_ids": torch.zeros(TEXT_TOKENS, 3)}
    return Subject(
        model=chroma_transformer(), arguments=arguments, ids=tiny.ids(), masks={"attention_mask": mask.bool()}
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "FLUX.1": flux_subject,
    "FLUX.1 Kontext": _kontext,
    "FLUX.1 Control": lambda: _channels(CHANNELS),
    "FLUX.1 ControlNet": _controlnet,
    "FLUX.2": _flux2,
    "FLUX.2 references": _flux2_references,
    "Chroma": _chroma,
}
