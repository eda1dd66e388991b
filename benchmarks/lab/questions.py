"""The questions that the lab answers, each with its variants. The others are compared with the first variant."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jitaccel.evaluation.comparison import Method
from jitaccel.evaluation.methods import parse_methods
from jitaccel.method.config import JiTConfig
from jitaccel.method.presets import PRESETS, pooled_start
from jitaccel.method.schedule import noise_levels

from . import lifters, variant
from .sizes import Sizes, on_levels
from .variant import Variant

# The paper's 7x, written out because findings here may change the product's presets.
PAPER = JiTConfig(densities=(0.32, 0.60, 1.0), boundaries=(0.4, 0.65, 1.0), steps=11)
CLEAN = PAPER.replace(lifter="clean", micro_flow="none")
REFERENCE = "dense:50"

Way = Variant | Sizes | Method
"""A variant or steps at two sizes, sampled by the lab; or a method of `jitaccel eval`, sampled by the pipeline."""


def staged(ends: tuple[int, ...], densities: tuple[float, ...]) -> JiTConfig:
    """Returns stages that end after the given steps, with everything else as in the preset few-steps."""
    boundaries = tuple((end + 1e-6) / ends[-1] for end in ends[:-1])
    return PRESETS["few-steps"].replace(densities=densities, boundaries=(*boundaries, 1.0), steps=ends[-1])


def dense(steps: int, schedule: str = "beta", solver: str = "euler") -> Variant:
    """Returns dense steps on the presets' levels, or on the "native" levels of the embedded model's scheduler."""
    levels = native_levels(steps) if schedule == "native" else "beta"
    config = JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=steps, schedule=levels)  # type: ignore[arg-type]
    return Variant(config=config.replace(solver=solver))


def native_levels(steps: int, shift: float = 0.63) -> tuple[float, ...]:
    """Returns FluxPipeline's levels for 32x32 tokens: even levels, shifted by exp(shift), then 0.

    `shift` is diffusers' `calculate_shift` for the embedded scheduler, from 0.5 at 256 tokens to 1.15 at 4096.
    """
    even = [1.0 - k * (1.0 - 1.0 / steps) / max(steps - 1, 1) for k in range(steps)]
    factor = math.exp(shift)
    return (*(factor / (factor + (1.0 / level - 1.0)) for level in even), 0.0)


def _named(pairs: Mapping[str, JiTConfig | Variant | Sizes]) -> Mapping[str, Way]:
    return MappingProxyType(
        {name: Variant(config=each) if isinstance(each, JiTConfig) else each for name, each in pairs.items()}
    )


def by_subset(config: JiTConfig) -> JiTConfig:
    """Returns a pooled configuration with the smaller picture replaced by a subset of equally many tokens."""
    return config.replace(pooling=())


def on_7x(*factors: int, **others: Any) -> Sizes:
    """Returns steps on the levels of 7x that pool by `factors`, followed by dense steps."""
    return on_levels(noise_levels(PRESETS["7x"]), factors, **others)


def _lifters(config: JiTConfig) -> dict[str, JiTConfig | Variant]:
    found: dict[str, JiTConfig | Variant] = {"nearest": Variant(config=config, lifter=lifters.nearest)}
    for sigma in (0.5, 1.5, 2.5):
        found[f"blur {sigma}"] = Variant(config=config, lifter=functools.partial(lifters.blurred, sigma=sigma))
    found["linear"] = Variant(config=config, lifter=lifters.linear)
    for sigma in (0.7, 1.0):
        found[f"weighted {sigma}"] = Variant(config=config, lifter=functools.partial(lifters.weighted, sigma=sigma))
    return found


CONTROLS = _named({
    **{f"dense:{n}": dense(n, "native") for n in (4, 5, 7, 10, 12, 20)},
    **{f"beta:{n}": dense(n) for n in (3, 4, 5, 6, 7, 11)},
    **{f"dpm:{n}": dense(n, solver="dpmpp_2m") for n in (4, 5, 6, 7, 12)},
})  # fmt: skip
_BUDGETS: Mapping[str, Mapping[str, Way]] = {
    "the cost of 10x": _named({
        "dpm:4": dense(4, solver="dpmpp_2m"),
        "10x": PRESETS["10x"],
        "1@0.5 5@1": staged((1, 5), (0.5, 1.0)),
        "dpm:5": dense(5, solver="dpmpp_2m"),
        "beta:5": dense(5),
        "dense:5": dense(5, "native"),
    }),
    "the cost of 7x": _named({
        "dpm:6": dense(6, solver="dpmpp_2m"),
        "7x": PRESETS["7x"],
        "1@0.5 7@1": staged((1, 7), (0.5, 1.0)),
        "2@0.32 8@1": staged((2, 8), (0.32, 1.0)),
        "2@0.32 4@0.6 9@1": staged((2, 4, 9), (0.32, 0.6, 1.0)),
        "dpm:7": dense(7, solver="dpmpp_2m"),
        "beta:6": dense(6),
        "beta:7": dense(7),
        "7x-paper": PAPER,
    }),
    "the cost of 4x": _named({
        "dpm:12": dense(12, solver="dpmpp_2m"),
        "4x": PRESETS["4x"],
        "beta:11": dense(11),
        "4x-paper": PAPER.replace(densities=(0.35, 0.62, 1.0), steps=18),
    }),
}  # fmt: skip

_SEVEN = PRESETS["7x"]
_POOLED: Mapping[str, Mapping[str, Way]] = {
    "pooled or subset": _named({
        "7x": _SEVEN,
        "7x by subset": by_subset(_SEVEN),
        "2 pooled, 5 dense": pooled_start(2, 5, _SEVEN.alpha, _SEVEN.beta),
        "2 at 25 %, 5 dense": by_subset(pooled_start(2, 5, _SEVEN.alpha, _SEVEN.beta)),
        "10x": PRESETS["10x"],
        "10x by subset": by_subset(PRESETS["10x"]),
        "dpm:6": dense(6, solver="dpmpp_2m"),
        "dpm:4": dense(4, solver="dpmpp_2m"),
    }),
    "position ids of pooled steps": _named({
        "7x": _SEVEN,
        "7x, strided ids": on_7x(*(2,) * 6, places="strided"),
        "7x, ids of the middle": on_7x(*(2,) * 6, places="centred"),
    }),
    "guidance of pooled steps": _named({
        "7x": _SEVEN,
        **{f"7x, guidance {w:+g}": on_7x(*(2,) * 6, guidance=w) for w in (-0.3, 0.3)},
    }),
    "correction from a dense step": _named({
        "1 dense, 5 pooled, 5 dense": on_7x(1, *(2,) * 5),
        "1 dense, 5 pooled, 5 dense, mean": on_7x(1, *(2,) * 5, correction="mean"),
        "1 dense, 5 pooled, 5 dense, coarse": on_7x(1, *(2,) * 5, correction="coarse"),
    }),
    "which steps are pooled": _named({
        "11 dense": on_7x(),
        "1 pooled, 10 dense": on_7x(2),
        "2 pooled, 9 dense": on_7x(2, 2),
        "4 pooled, 7 dense": on_7x(2, 2, 2, 2),
        "7x": _SEVEN,
        "1 dense, 5 pooled, 5 dense": on_7x(1, *(2,) * 5),
        "2 dense, 4 pooled, 5 dense": on_7x(1, 1, *(2,) * 4),
        "every other of 6 pooled": on_7x(1, 2, 1, 2, 1, 2),
    }),
    "factor": _named({
        "7x": _SEVEN,
        "2 by 4, 4 by 2, 5 dense": on_7x(4, 4, 2, 2, 2, 2),
        "6 by 4, 5 dense": on_7x(*(4,) * 6),
    }),
    "one step pooled": _named({
        "11 dense": on_7x(),
        **{f"step {k + 1} pooled": on_7x(*(1,) * k, 2) for k in (0, 2, 4, 5, 7, 9)},
    }),
}  # fmt: skip

QUESTIONS: Mapping[str, Mapping[str, Way]] = MappingProxyType({
    **_BUDGETS,
    **_POOLED,
    "solver": _named({
        "7x-paper": PAPER,
        "7x-paper, dpm": PAPER.replace(solver="dpmpp_2m"),
        "clean, none": CLEAN,
        "clean, none, dpm": CLEAN.replace(solver="dpmpp_2m"),
        "best parts": Variant(
            config=CLEAN.replace(solver="dpmpp_2m"), lifter=lifters.nearest, scores=variant.clean_variance
        ),
    }),
    "7x by Euler's steps": _named({"7x": PRESETS["7x"], "7x, euler": PRESETS["7x"].replace(solver="euler")}),
    "micro-flow": _named({
        "7x-paper": PAPER,
        "exact": PAPER.replace(micro_flow="exact"),
        "none": PAPER.replace(micro_flow="none"),
        "released, own noise": PAPER.replace(noise="own"),
        "exact, own noise": PAPER.replace(micro_flow="exact", noise="own"),
    }),
    "what is lifted": _named({
        "7x-paper": PAPER,
        "clean": PAPER.replace(lifter="clean"),
        "clean, none": CLEAN,
        "clean, exact, own noise": PAPER.replace(lifter="clean", micro_flow="exact", noise="own"),
    }),
    "lifter": _named({"clean, none": CLEAN, **_lifters(CLEAN)}),
    "importance": _named({
        "clean, none": CLEAN,
        "clean variance": Variant(config=CLEAN, scores=variant.clean_variance),
        "gradient": Variant(config=CLEAN, scores=variant.gradient),
        "left-out error": Variant(config=CLEAN, scores=variant.left_out_error),
        "attention to words": Variant(config=CLEAN, scores=variant.words_attended),
        "fixed grid": Variant(config=CLEAN, scores=variant.fixed_grid),
        "random": Variant(config=CLEAN, scores=variant.random_scores),
    }),
    "stale keys": _named({"clean, none": CLEAN, "stale keys": Variant(config=CLEAN, stale_keys=True)}),
    "cache": _named({
        "clean, none": CLEAN,
        **{f"cache {t}": Variant(config=CLEAN, cache_threshold=t) for t in (0.1, 0.2, 0.4)},
    }),
    "a cache in the stages of 7x": _named({
        "7x": PRESETS["7x"],
        **{f"7x, cache {t}": Variant(config=PRESETS["7x"], cache_threshold=t) for t in (0.2, 0.4)},
        "10x": PRESETS["10x"],
    }),
    "rivals": {method.name: method for method in parse_methods(
        "firstblock:28:0.2,firstblock:28:0.4,taylorseer-lite:28:4,half:11:4"
    )},
})  # fmt: skip
