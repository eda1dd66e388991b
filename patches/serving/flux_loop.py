"""The denoising loop for an engine's FLUX.1, for one picture or a batch. The engine calls its network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jitaccel.generation.ranks import ALONE, Ranks
from jitaccel.generation.route import Answer, Generation, Network
from jitaccel.method.config import JiTConfig
from jitaccel.method.presets import resolve
from jitaccel.method.run import Run
from jitaccel.method.schedule import noise_levels
from jitaccel.method.steps import KnownLevels

from ..flux.arguments import grid_of_ids
from ..flux.indexed import calls_at_anchors
from ..flux.kinds import FLUX
from ..split import Split

Predict = Callable[[Mapping[str, Any], Mapping[str, Any] | None], Tensor]
"""Runs the network on the arguments of the guided and the unguided branch, and returns the guided result."""

_OF_APPLY = ("preset", "strict", "on_unsupported", "execution", "attention", "compile", "controlnet")


def config_of(settings: Mapping[str, Any]) -> JiTConfig:
    """Returns the configuration for settings, which are arguments of `jitaccel.apply`.

    Settings about execution are ignored, because the engine decides on it.

    Raises:
        ConfigError: If the preset or a setting is unknown.
    """
    fields = {name: value for name, value in settings.items() if name not in _OF_APPLY}
    return resolve(settings.get("preset", "7x"), **fields)


def own_levels(config: JiTConfig) -> tuple[float, ...] | None:
    """Returns a configuration's noise levels, rounded as in a scheduler's tensor; None for the scheduler's own."""
    if config.schedule == "native":
        return None
    return tuple(np.asarray(noise_levels(config), dtype=np.float32).tolist())


class FluxLoop:
    """The denoising of one batch: holds its state and advances it step by step.

    Args:
        config: The configuration to run.
        levels: The noise levels, first to last, 0 included.
        latents: (B, N, D), noise.
        ids: (N, 3), position ids of every token.
        text_tokens: Number of tokens in the prompt.
        multiple: The number of anchors is rounded up to a multiple of this.
        ranks: The ranks that make the picture together. The constructor checks that they start identically.

    Raises:
        ConfigError: If the configuration does not allow this size, or ranks start differently.
    """

    def __init__(
        self,
        config: JiTConfig,
        levels: tuple[float, ...],
        latents: Tensor,
        ids: Tensor,
        text_tokens: int,
        *,
        multiple: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        self._clock = KnownLevels(config, levels)
        self.state = latents
        self.generation = Generation(
            config,
            grid_of_ids(ids, latents.shape[1]),
            self._clock.step(0),
            latents,
            cost=lambda image_tokens, text_tokens: image_tokens + text_tokens,  # never read: no FLOPs are reported
            text_tokens=text_tokens,
            multiple=multiple,
            patch=FLUX.patch,
            ranks=ranks,
        )

    def advance(self, index: int, network: Network, branches: int = 1) -> Tensor:
        """Returns the state (B, N, D) after step `index`.

        Args:
            index: Index of the step; steps must come in order.
            network: Runs the network on the anchors, with guidance.
            branches: Number of guidance branches.
        """
        step, generation = self._clock.step(index), self.generation
        self.state = generation.enter(step, self.state)
        answer = generation.evaluate(step, self.state, network, branches)
        velocity = generation.leave(step, self.state, answer)
        change = float(np.float32(step.next_level) - np.float32(step.noise_level))
        self.state = (self.state.float() + change * velocity).to(self.state.dtype)
        if index == self._clock.num_steps - 1:
            generation.run.check_finite()
        return self.state

    def tokens(self) -> list[int]:
        """Returns the number of image tokens that the network got at each step."""
        return [step.tokens for step in self.generation.recorder.steps()]


def of_arguments(positive: Mapping[str, Any], negative: Mapping[str, Any] | None, predict: Predict) -> Network:
    """Returns a network built from diffusers' arguments. It runs once, or once per image if anchors differ.

    Args:
        positive: The arguments of the network for all tokens.
        negative: The same for the unguided branch; None without guidance.
        predict: Runs the network.
    """

    def network(run: Run, state: Tensor) -> Answer:
        split = Split(state, state.shape[1], state.shape[2])
        guided = calls_at_anchors(FLUX, positive, split, run, state)
        others = None if negative is None else calls_at_anchors(FLUX, negative, split, run, state)
        unguided = [None] * len(guided) if others is None else others
        return Answer(torch.cat([predict(*both) for both in zip(guided, unguided, strict=True)]))

    return network
