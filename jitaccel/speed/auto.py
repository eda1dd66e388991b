"""Steps and densities for a target speed: `preset="auto"`, chosen by measured costs of steps on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from ..errors import ConfigError, UnsupportedModelError
from ..execution.options import Attention, Execution, Mode
from ..limits import MOST_TEXT_TOKENS
from ..method.checks import is_finite_number
from ..method.config import JiTConfig
from ..method.overrides import Overrides, arguments_of, check_fields
from ..method.presets import DENSE_STEPS, POOLED_PLANS, few_steps
from .cost import Costs, Seconds, StageTokens, loop_seconds, measure
from .target import target_problems

_OWN_FIELDS = ("densities", "boundaries", "steps", "pooling")  # the fields of JiTConfig that are chosen here

# Best first: the first affordable configuration is used, so a larger budget never gets a worse one. Once ten dense
# steps are affordable, pooled steps no longer improve on them (docs/exact-lab.md).
FAMILY: tuple[JiTConfig, ...] = (
    *(few_steps(steps) for steps in range(DENSE_STEPS, 10, -1)),
    *(config for (_, dense), config in POOLED_PLANS.items() if dense < 8),
)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen configuration and the reason. Pass `config` to `apply`, or `costs` to `decide` for another target.

    predicted_ms: milliseconds of the denoising loop (networks and lifts) for one image and one branch; true CFG takes
    twice that.
    predicted_speedup: relative to 50 dense steps of the same untouched model.
    """

    config: JiTConfig
    predicted_ms: float
    predicted_speedup: float
    costs: Costs

    def __str__(self) -> str:
        costs = self.costs
        measured = ", ".join(f"{tokens} tokens {1000 * seconds:.2f} ms" for tokens, seconds in costs.measured)
        return (
            f"{_describe(self.config)}: predicted {self.predicted_ms:.1f} ms, {self.predicted_speedup:.2f}x against "
            f"{DENSE_STEPS} dense steps of {1000 * costs.dense_s:.2f} ms; measured with {costs.text_tokens} text "
            f"tokens: {measured}"
        )


def choose(
    cost: Seconds,
    num_tokens: int,
    budget_s: float,
    family: Sequence[JiTConfig] = FAMILY,
    *,
    multiple: int = 1,
    stage_tokens: StageTokens | None = None,
) -> JiTConfig:
    """Returns the first configuration of a family whose steps take at most `budget_s` seconds.

    A budget larger than the most expensive configuration gets that one, because a budget is an upper limit.

    Args:
        cost: Seconds of a step by its tokens, for one image and one branch.
        num_tokens: N.
        budget_s: Seconds for all steps.
        family: Candidates, best first.
        multiple: Numbers of anchors are rounded up to a multiple of this.
        stage_tokens: As in `loop_seconds`.

    Raises:
        ConfigError: If even the cheapest configuration exceeds the budget; the message names it.
    """
    if not is_finite_number(budget_s) or budget_s <= 0.0:
        raise ConfigError(f"choose: budget_s must be a finite number above 0, got {budget_s!r}; give seconds")
    for member in family:
        if loop_seconds(member, num_tokens, cost, multiple, stage_tokens) <= budget_s:
            return member
    config, seconds = fastest(cost, num_tokens, family, multiple=multiple, stage_tokens=stage_tokens)
    raise ConfigError(
        f"choose: budget_s must be at least {seconds:.6g}, which {_describe(config)} take, got {budget_s:.6g}; "
        f"allow that, or make smaller pictures"
    )


def fastest(
    cost: Seconds,
    num_tokens: int,
    family: Sequence[JiTConfig] = FAMILY,
    *,
    multiple: int = 1,
    stage_tokens: StageTokens | None = None,
) -> tuple[JiTConfig, float]:
    """Returns the cheapest configuration of a family and the seconds of its steps."""
    priced = ((config, loop_seconds(config, num_tokens, cost, multiple, stage_tokens)) for config in family)
    return min(priced, key=lambda pair: pair[1])


def decide(
    costs: Costs,
    *,
    target_speedup: float | None = None,
    target_ms: float | None = None,
    family: Sequence[JiTConfig] = FAMILY,
    **overrides: Unpack[Overrides],
) -> Choice:
    """Returns the choice for a target from costs measured earlier; arguments and errors as in `auto_config`."""
    check_target(target_speedup, target_ms, overrides)
    dense_s = DENSE_STEPS * costs.dense_s
    budget_s = dense_s / target_speedup if target_speedup is not None else (target_ms or 0.0) / 1000.0
    cheapest, least_s = fastest(costs, costs.num_tokens, family, stage_tokens=costs.stage_tokens)
    if budget_s < least_s:
        if target_speedup is not None:
            limit = f"target_speedup must be at most {_floor(dense_s / least_s):g}"
        else:
            limit = f"target_ms must be at least {-_floor(-1000.0 * least_s):g}"
        asked = target_ms if target_speedup is None else target_speedup
        raise ConfigError(
            f"auto_config: {limit} on this machine ({_describe(cheapest)}), got {asked!r}; "
            f"ask for that, or make smaller pictures"
        )
    config = choose(costs, costs.num_tokens, budget_s, family, stage_tokens=costs.stage_tokens)
    seconds = loop_seconds(config, costs.num_tokens, costs, stage_tokens=costs.stage_tokens)
    changes = {**costs.defaults, **overrides}
    return Choice(
        config=config.replace(**changes) if changes else config,
        predicted_ms=1000.0 * seconds,
        predicted_speedup=dense_s / seconds,
        costs=costs,
    )


def auto_config(
    target: Any,
    *,
    target_speedup: float | None = None,
    target_ms: float | None = None,
    size: tuple[int, int] | None = None,
    text_tokens: int | None = None,
    execution: Mode = "auto",
    attention: Attention = "auto",
    call: Mapping[str, Any] | None = None,
    clock: Callable[[], float] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **overrides: Unpack[Overrides],
) -> Choice:
    """Returns the configuration that reaches a speed on this machine, with its predicted cost. Applies nothing.

    jitaccel times a few steps of `target` at four densities, on its own device and dtype and as `apply` would run them,
    fits a cost model, and picks the first configuration that meets the target. Candidates with more steps come first.
    The timing takes four rounds, each about as long as five dense steps.

    Args:
        target: A diffusers pipeline that starts from noise, or a transformer of FLUX.1, FLUX.2 or Chroma.
        target_speedup: Relative to 50 dense steps of the untouched model, above 1. Give this or `target_ms`.
        target_ms: Milliseconds for the denoising loop of one image and one branch; true CFG takes twice that, and a
            batch proportionally more. Excludes text encoding, decoding, ControlNets and reference pictures.
        size: (height, width) of the pictures in pixels; defaults to the pipeline's size. Required for a bare
            transformer, whose tokens are assumed to cover 16 x 16 pixels.
        text_tokens: Prompt length including padding; defaults to the pipeline's padded length, or 512.
        execution: As in `apply`. Compilation is not measured; its gain comes on top.
        attention: As in `apply`.
        call: As in `Auto`.
        clock: Returns seconds; for tests.
        progress: Called after each forward with the number of forwards done and the expected total.
        **overrides: Fields of JiTConfig other than densities, boundaries, steps and pooling.

    Raises:
        ConfigError: For a target that is out of reach; the message names the fastest possible.
        UnsupportedModelError: For a model that cannot be measured.
    """
    check_fields("auto_config", overrides, arguments_of(auto_config))
    check_target(target_speedup, target_ms, overrides)
    how = Execution(execution=execution, attention=attention)
    costs = measure_costs(target, size, text_tokens, how, clock, progress, call)
    return decide(costs, target_speedup=target_speedup, target_ms=target_ms, **overrides)


def measure_costs(
    target: Any,
    size: tuple[int, int] | None = None,
    text_tokens: int | None = None,
    execution: Execution | None = None,
    clock: Callable[[], float] | None = None,
    progress: Callable[[int, int], None] | None = None,
    call: Mapping[str, Any] | None = None,
) -> Costs:
    """Returns the measured costs of a target's steps on this machine; arguments as in `auto_config`."""
    from .. import patches

    is_length = isinstance(text_tokens, int) and not isinstance(text_tokens, bool)
    if text_tokens is not None and not (is_length and 1 <= text_tokens <= MOST_TEXT_TOKENS):
        raise ConfigError(
            f"auto_config: text_tokens must be a whole number in 1..{MOST_TEXT_TOKENS}, got {text_tokens!r}; "
            f"count the padding too"
        )
    patch = patches.find(target)
    if patch.probe is None:
        raise UnsupportedModelError(
            f"auto_config: target must be a pipeline of diffusers, or a transformer of FLUX.1, FLUX.2 or Chroma, whose "
            f"steps can be timed beforehand, got {type(target).__name__}; give its pipeline, or a preset "
            f'("4x", "7x") or a JiTConfig instead'
        )
    probe = patch.probe(target, size, text_tokens, execution or Execution(), call or {})
    try:
        costs = measure(probe, clock, progress)
    finally:
        probe.release()
    return costs if patch.defaults is None else replace(costs, defaults=patch.defaults(target))


def check_target(target_speedup: float | None, target_ms: float | None, overrides: Mapping[str, Any]) -> None:
    """Raises ConfigError, listing every problem, unless exactly one target is given and no chosen field is."""
    names = ("target_speedup", "target_ms")
    if problems := [*target_problems("auto_config", names, (target_speedup, target_ms)), *_chosen_problems(overrides)]:
        raise ConfigError("\n".join(problems))


def _chosen_problems(overrides: Mapping[str, Any]) -> list[str]:
    return [
        f"auto_config: {name} must be left out, got {overrides[name]!r}, because it is chosen automatically; "
        f'give a preset ("4x", "7x") to set it yourself'
        for name in _OWN_FIELDS
        if name in overrides
    ]


def _describe(config: JiTConfig) -> str:
    return f"{config.steps} steps at densities {', '.join(f'{density:g}' for density in config.densities)}"


def _floor(value: float) -> float:
    """Returns the number rounded down to four significant digits, so that a limit shown in a message can be met."""
    digits = 3 - math.floor(math.log10(abs(value)))
    return math.floor(value * 10.0**digits) / 10.0**digits
