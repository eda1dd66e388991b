"""Times the same generation with several methods: dense, the dense control, and the presets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import jitaccel

from ..errors import ConfigError
from ..generation.handle import Handle
from ..generation.stats import Cost, Stats
from ..generation.stopwatch import wait_for
from ..method.config import JiTConfig
from ..method.presets import DENSE_STEPS, PRESETS
from ..patches import cost_of
from ..speed.control import dense_control, schedule_flops


class Rival(Protocol):
    """A method of another project: returns what `pipe(**call)` makes with it, and leaves the pipeline unchanged.

    steps: of the sampler. settings: everything else, apart from the call, that its pictures depend on, as JSON values.
    """

    @property
    def steps(self) -> int: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def __call__(self, pipe: Any, on_step: Callable[[], object] | None, call: Mapping[str, Any]) -> TimedCall: ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to generate: with a rival, with `config` applied to the pipeline, or, if both are None, untouched."""

    name: str
    steps: int
    config: JiTConfig | None = None
    rival: Rival | None = None

    @property
    def settings(self) -> dict[str, Any] | None:
        """All settings, apart from call and steps, that pictures depend on, as JSON values; None if untouched."""
        if self.rival is not None:
            return self.rival.settings
        return None if self.config is None else self.config.to_dict()


@dataclass(frozen=True, kw_only=True)
class TimedCall:
    """The result of one pipeline call and its cost, for the whole batch.

    Attributes:
        denoise_s: Seconds from the first call of the transformer to the end of the last step.
        whole_s: Seconds including text encoding and decoding.
        token_steps: Image tokens through the network, summed over the steps, for one image. Where a cache skips parts
            of a step, that step counts as the share of a dense one that ran.
        stats: None for the untouched pipeline and for rivals.
    """

    pictures: Any
    denoise_s: float
    whole_s: float
    flops: int
    token_steps: int
    stats: Stats | None


def compared_methods(cost: Cost, num_tokens: int, text_tokens: int) -> tuple[Method, ...]:
    """Returns 50 dense steps on the pipeline's own levels, the dense control with the cost of 7x, 4x and 7x.

    cost: operations of one forward by numbers of tokens.
    """
    control = dense_control(PRESETS["7x"], num_tokens, text_tokens, cost)
    configs = {"control": control, "4x": PRESETS["4x"], "7x": PRESETS["7x"]}
    sparse = [Method(name=name, steps=_steps(config), config=config) for name, config in configs.items()]
    return (Method(name="dense", steps=DENSE_STEPS), *sparse)


def _steps(config: JiTConfig) -> int:
    if isinstance(config.steps, str):
        raise ValueError("comparison: config.steps must be a number, got 'caller'")
    return config.steps


def generate(pipe: Any, method: Method, on_step: Callable[[], object] | None = None, **call: Any) -> TimedCall:
    """Returns what `pipe(**call)` makes with a method; `on_step` is called after every step."""
    if method.rival is not None:
        return method.rival(pipe, on_step, call)
    accelerated = nullcontext() if method.config is None else jitaccel.apply(pipe, method.config)
    with accelerated as handle:
        return timed(pipe, method.steps, handle, on_step, **call)


def timed(
    pipe: Any, steps: int, handle: Handle | None, on_step: Callable[[], object] | None = None, **call: Any
) -> TimedCall:
    """Returns the timed result of `pipe(**call)`, given the handle of what is applied to it, if any."""
    clock = _DenoisingClock(pipe, on_step)
    with clock.watch():
        start = clock.now()
        pictures = pipe(num_inference_steps=steps, callback_on_step_end=clock.on_step_end, **call).images
        whole_s = clock.now() - start
    stats = None if handle is None else handle.stats()
    flops, token_steps = _dense_cost(pipe, steps, clock) if stats is None else (stats.flops, stats.token_steps)
    return TimedCall(
        pictures=pictures,
        denoise_s=clock.seconds,
        whole_s=whole_s,
        flops=flops,
        token_steps=token_steps,
        stats=stats,
    )


def warm_up(pipe: Any, **call: Any) -> None:
    """Runs a step or two at every token count of the methods, so that no timing includes first-call costs."""
    for name in ("4x", "7x"):
        config = _shortest(PRESETS[name])
        generate(pipe, Method(name=name, steps=_steps(config), config=config), **call)


def _shortest(config: JiTConfig) -> JiTConfig:
    """Returns the configuration with the smallest number of steps that skips no stage."""
    for steps in range(config.num_stages, _steps(config)):
        try:
            return config.replace(steps=steps)
        except ConfigError:
            continue
    return config


def _dense_cost(pipe: Any, steps: int, clock: _DenoisingClock) -> tuple[int, int]:
    batch, tokens, text_tokens = clock.shape
    flops = schedule_flops(PRESETS["dense"], tokens, text_tokens, cost_of(pipe), steps)
    return batch * flops, steps * tokens


class _DenoisingClock:
    """Records when a pipeline's first step starts and its last one ends; waits for the device at both."""

    def __init__(self, pipe: Any, on_step: Callable[[], object] | None) -> None:
        self._pipe, self._on_step = pipe, on_step
        self._device = torch.device("cpu")
        self._start: float | None = None
        self._end = 0.0
        self.shape = (0, 0, 0)

    def now(self) -> float:
        wait_for(self._device)
        return time.perf_counter()

    @property
    def seconds(self) -> float:
        return 0.0 if self._start is None else self._end - self._start

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Observes every call of the transformer inside the block."""
        seen = self._pipe.transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        try:
            yield
        finally:
            seen.remove()

    def _before_forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._start is None:
            state = kwargs["hidden_states"]
            self.shape = (state.shape[0], state.shape[1], kwargs["encoder_hidden_states"].shape[1])
            self._device = state.device  # the model's own device may be the one it is offloaded to
            self._start = self.now()

    def on_step_end(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if self._on_step is not None:
            self._on_step()
        if index + 1 == pipe.num_timesteps:
            self._end = self.now()
        return {}
