"""What to run: stages, schedule and variants of the method, as one frozen value."""

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, Unpack

from ..errors import ConfigError
from ..limits import MOST_SHARED
from .checks import MAX_STEPS, check_steps, choice_problems, is_finite_number, is_step_count, is_whole, stage_problems
from .counts import has_empty_stage, pooled_count, whole_part, with_side
from .overrides import Overrides, check_fields

_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "lifter": ("velocity", "clean"),
        "micro_flow": ("exact", "released", "none"),
        "noise": ("fresh", "own"),
        "solver": ("euler", "dpmpp_2m", "caller"),
    }
)
_SCHEDULES = ("beta", "log_snr", "native")
_FACTORS = (1, 2, 4)
MAX_WINDOW = 1023  # a limit of the operators
_MAX_TOKENS = 2**40  # a limit of the operators


@dataclass(frozen=True, kw_only=True)
class JiTConfig:
    """A schedule of stages and the variants of the method (Just-in-Time, arXiv:2603.10744).

    Lists and whole numbers are accepted where tuples and floats are declared; they are converted.

    Attributes:
        densities: Share of the tokens that enter the network in each stage, sparsest first; the last is 1.0.
        boundaries: Share of the steps after which each stage ends; the last is 1.0.
        steps: Number of steps, or "caller" to use the number the sampler asks for.
        schedule: "beta" (levels from a Beta distribution), "log_snr" (levels evenly spaced in the logarithm of the
            signal-to-noise ratio), "native" (the sampler's own levels), or the noise levels themselves, falling to 0.0.
        alpha: First parameter of the Beta distribution.
        beta: Second parameter. The paper's text says 0.42, its code 0.425.
        log_snr: For schedule="log_snr": log((1 - level) / level) at the second level, which follows 1.0, and at the
            last level above 0.0.
        lifter: What is interpolated from the anchors to the other tokens: the "velocity" (paper) or the "clean"
            estimate.
        micro_flow: How far newly activated tokens move to their target: all the way ("exact", the paper's hitting ODE),
            by one blend of weight 1 / relax_steps ("released", the authors' code), or not at all ("none").
        relax_steps: Divisor of the released blend.
        noise: Noise of the target: "fresh" (paper) or the token's "own" initial noise.
        solver: "euler" (paper) or "dpmpp_2m", DPM-Solver++(2M) (arXiv:2211.01095), which extrapolates the clean
            estimate from the previous step. Its correction is folded into the velocity the model returns, so you keep
            your Euler scheduler or loop. "caller" leaves the step to the scheduler of a diffusers pipeline: UniPC and
            DPM-Solver++ keep their own solver, which restarts at newly activated tokens.
        importance_window: Side in tokens of the window of the local variance; odd.
        blur_scale: The lift blurs with standard deviation clip(blur_scale / sqrt(density), 1, 10) tokens. If
            blur_scale is at most sqrt(density), as in every preset, the width is 1 token.
        pooling: For each stage, the factor by which the picture is reduced along both sides before the network sees it.
            1 keeps its tokens; with 2 or 4, each latent is the mean of a block, at its own noise level (a variant of
            ours, `jitaccel.method.pool`). A stage with factor f > 1 must have density 1 / f^2. Empty if no stage pools.
        multiple: Numbers of tokens that enter the network are rounded up to a multiple of this. Set it if you divide
            tokens among ranks in a way that jitaccel cannot read off the model; the least common multiple with what it
            does read off is used.
    Raises:
        ConfigError: For an invalid configuration; the message lists every problem, one per line.
    """

    densities: tuple[float, ...]
    boundaries: tuple[float, ...]
    steps: int | Literal["caller"]
    schedule: Literal["beta", "log_snr", "native"] | tuple[float, ...] = "beta"
    alpha: float = 1.4
    beta: float = 0.425
    log_snr: tuple[float, float] = (-5.0, 3.0)
    lifter: Literal["velocity", "clean"] = "velocity"
    micro_flow: Literal["exact", "released", "none"] = "released"
    relax_steps: int = 3
    noise: Literal["fresh", "own"] = "fresh"
    solver: Literal["euler", "dpmpp_2m", "caller"] = "euler"
    importance_window: int = 3
    blur_scale: float = 0.4
    pooling: tuple[int, ...] = ()
    multiple: int = 1

    def __post_init__(self) -> None:
        problems: list[str] = []
        densities = self._normalise("densities", problems)
        boundaries = self._normalise("boundaries", problems)
        if densities is not None:
            problems += stage_problems("densities", densities, "list the sparsest stage first")
        if boundaries is not None:
            problems += stage_problems("boundaries", boundaries, "order the stages' ends")
        if densities is not None and boundaries is not None and len(densities) != len(boundaries):
            problems.append(
                f"JiTConfig: boundaries must be as many as densities, got {len(boundaries)} boundaries and "
                f"{len(densities)} densities; give each stage one of both"
            )
        problems += self._pooling_problems()
        problems += self._schedule_problems()
        problems += self._scalar_problems()
        if not problems and self.steps != "caller":
            problems += self._empty_stage_problems(self.steps, "JiTConfig")
        if problems:
            raise ConfigError("\n".join(problems))
        for name, kind in (("alpha", float), ("beta", float), ("blur_scale", float), ("relax_steps", int)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        for name in ("importance_window", "multiple"):
            object.__setattr__(self, name, int(getattr(self, name)))

    def _normalise(self, name: str, problems: list[str]) -> tuple[float, ...] | None:
        """Stores the field as a tuple of floats and returns it, or adds a problem and returns None."""
        value = getattr(self, name)
        is_sequence = isinstance(value, (tuple, list)) and len(value) > 0
        if not is_sequence or not all(is_finite_number(item) for item in value):
            examples = {"schedule": '"beta" or (1.0, 0.5, 0.0)', "log_snr": "(-5.0, 3.0)"}
            example = examples.get(name, "(0.35, 0.62, 1.0)")
            problems.append(
                f"JiTConfig: {name} must be a non-empty tuple of finite numbers, got {value!r}; "
                f"give for example {example}"
            )
            return None
        items = tuple(float(item) for item in value)
        object.__setattr__(self, name, items)
        return items

    def _pooling_problems(self) -> list[str]:
        """Stores `pooling` as a tuple of whole numbers, empty if no stage pools, and returns what is wrong with it."""
        value, densities = self.pooling, self.densities
        is_sequence = isinstance(value, (tuple, list))
        if not is_sequence or not all(is_whole(factor) and factor in _FACTORS for factor in value):
            return [
                f"JiTConfig: pooling must be a tuple of {', '.join(map(str, _FACTORS))}, one for each stage, got "
                f"{value!r}; give for example densities=(0.25, 1.0), pooling=(2, 1), or ()"
            ]
        factors = tuple(int(factor) for factor in value)
        object.__setattr__(self, "pooling", factors if any(factor > 1 for factor in factors) else ())
        if not self.pooling or not isinstance(densities, tuple):
            return []
        if len(factors) != len(densities):
            return [
                f"JiTConfig: pooling must have one factor for each of densities, got {len(factors)} factors and "
                f"{len(densities)} densities; give 1 for a stage that does not pool"
            ]
        return [
            f"JiTConfig: a stage that pools by {factor} must have density {1 / factor**2:g}, got {density!r}; "
            f"set it, because every latent it sees is the mean of {factor**2}, or use pooling=() to leave tokens out"
            for factor, density in zip(factors, densities, strict=True)
            if factor > 1 and density != 1 / factor**2
        ]

    def _schedule_problems(self) -> list[str]:
        problems = []
        steps = self.steps
        steps_valid = steps == "caller" or is_step_count(steps)
        if not steps_valid:
            problems.append(
                f'JiTConfig: steps must be a whole number from 1 to {MAX_STEPS} or "caller", '
                f"got {steps!r}; give the number of denoising steps"
            )
        elif steps != "caller":
            object.__setattr__(self, "steps", int(steps))
        if isinstance(self.schedule, str):
            return problems + choice_problems("schedule", self.schedule, _SCHEDULES)
        levels = self._normalise("schedule", problems)
        if levels is None:
            return problems
        falls = all(after < before for before, after in pairwise(levels))
        if len(levels) < 2 or not falls or not 0.0 < levels[0] <= 1.0 or levels[-1] != 0.0:
            problems.append(
                f"JiTConfig: schedule must fall strictly from a level in (0, 1] to 0.0, got {levels}; "
                f"list the noise levels, the final 0.0 included"
            )
        if steps_valid and steps != len(levels) - 1:
            problems.append(
                f"JiTConfig: steps must equal the levels of schedule less one, got {steps!r} steps and "
                f"{len(levels)} levels; use steps={len(levels) - 1}"
            )
        return problems

    def _scalar_problems(self) -> list[str]:
        problems: list[str] = []
        ends = self._normalise("log_snr", problems)
        if ends is not None and (len(ends) != 2 or not -30.0 <= ends[0] < ends[1] <= 30.0):
            problems.append(
                f"JiTConfig: log_snr must be two numbers that rise within -30..30, got {ends}; "
                f"give the values of the second and the last level, for example (-5.0, 3.0)"
            )
        for name, choices in _CHOICES.items():
            problems += choice_problems(name, getattr(self, name), choices)
        for name, usual in (("alpha", 1.4), ("beta", 0.425), ("blur_scale", 0.4)):
            value = getattr(self, name)
            if not is_finite_number(value) or value <= 0:
                problems.append(f"JiTConfig: {name} must be a finite number above 0, got {value!r}; try {usual}")
        if not is_whole(self.relax_steps) or self.relax_steps < 1:
            problems.append(
                f"JiTConfig: relax_steps must be a whole number above 0, got {self.relax_steps!r}; "
                f"the released code uses 3"
            )
        if not is_whole(self.multiple) or not 1 <= self.multiple <= MOST_SHARED:
            problems.append(
                f"JiTConfig: multiple must be a whole number in 1..{MOST_SHARED}, got {self.multiple!r}; "
                f"give the number of ranks that divide the tokens, or 1"
            )
        window = self.importance_window
        if not is_whole(window) or not 1 <= window <= MAX_WINDOW or window % 2 == 0:
            problems.append(
                f"JiTConfig: importance_window must be an odd whole number in 1..{MAX_WINDOW}, got {window!r}; "
                f"the paper uses 3"
            )
        return problems

    def _empty_stage_problems(self, steps: int, function: str) -> list[str]:
        ends = self._ends(steps)
        if not has_empty_stage(ends):
            return []
        enough = next((n for n in range(steps, MAX_STEPS + 1) if not has_empty_stage(self._ends(n))), None)
        remedy = "space the boundaries further apart" if enough is None else f"use {enough} steps"
        return [
            f"{function}: steps must give every stage at least one step, got {steps} "
            f"(stages end after {', '.join(map(str, ends))}); {remedy}"
        ]

    def _ends(self, steps: int) -> tuple[int, ...]:
        return tuple(whole_part(boundary, steps) for boundary in self.boundaries)

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.densities)

    def pooling_of(self, stage: int) -> int:
        """Returns the factor by which a stage reduces each side of the picture; 1 if it does not pool."""
        return self.pooling[stage] if self.pooling else 1

    @property
    def move_weight(self) -> float:
        """How far newly activated tokens move to their target: exact 1, released 1 / relax_steps, none 0."""
        return {"exact": 1.0, "released": 1.0 / self.relax_steps, "none": 0.0}[self.micro_flow]

    def stage_ends(self, steps: int) -> tuple[int, ...]:
        """Returns for each stage the number of steps done when it ends: the whole part of `steps * boundary`.

        A product that floating point leaves just below a whole number counts as that number: 100 steps with boundary
        0.29 end after 29 (28 in the released code). Also unlike the released code, a step count that skips a stage is
        refused (3 steps of the paper's preset would end after 1, 1, 3).

        Raises:
            ConfigError: If a stage would get no step; the message names the next step count that works.
        """
        check_steps("stage_ends", steps)
        problems = self._empty_stage_problems(steps, "stage_ends")
        if problems:
            raise ConfigError("\n".join(problems))
        return self._ends(steps)

    def stage_lengths(self, steps: int) -> tuple[int, ...]:
        """Returns the number of steps of each stage. Raises ConfigError as `stage_ends` does."""
        return tuple(end - start for start, end in pairwise((0, *self.stage_ends(steps))))

    def stage_of_step(self, step: int, steps: int) -> int:
        """Returns the stage (0 is the sparsest) of step `step`, counted from 0, out of `steps`."""
        ends = self.stage_ends(steps)
        if not is_whole(step) or not 0 <= step < steps:
            raise ConfigError(f"stage_of_step: step must be in 0..{steps - 1}, got {step!r}; count from 0")
        return bisect_right(ends, step)

    def token_counts(self, num_tokens: int, num_forced: int = 0, multiple: int = 1) -> tuple[int, ...]:
        """Returns the number of anchors of each stage: the whole part of `density * num_tokens`.

        On a small grid two stages may get the same count; the later one then activates nothing, which is harmless.
        Rounds as `stage_ends` does.

        Args:
            num_tokens: Tokens of the grid.
            num_forced: Tokens that are anchors in every stage. The densities then are shares of the others.
            multiple: Counts are rounded up to a multiple of both this and the field `multiple`, but not beyond the
                grid.

        Raises:
            ConfigError: If a stage would get no token.
        """
        if not is_whole(num_tokens) or not 1 <= num_tokens <= _MAX_TOKENS:
            raise ConfigError(
                f"token_counts: num_tokens must be a whole number from 1 to 2^40, got {num_tokens!r}; "
                f"pass grid_h * grid_w"
            )
        if not is_whole(num_forced) or not 0 <= num_forced <= num_tokens:
            raise ConfigError(
                f"token_counts: num_forced must be a whole number in 0..{num_tokens}, the tokens, got {num_forced!r}; "
                f"count those under the mask"
            )
        if not is_whole(multiple) or not 1 <= multiple <= MOST_SHARED:
            raise ConfigError(
                f"token_counts: multiple must be a whole number in 1..{MOST_SHARED}, got {multiple!r}; leave it "
                f"out for 1"
            )
        others = num_tokens - num_forced
        counts = tuple(num_forced + whole_part(density, others) for density in self.densities)
        if counts[0] < 1:
            raise ConfigError(
                f"token_counts: num_tokens must give every stage a token, got {num_tokens} tokens at "
                f"density {self.densities[0]}; use {math.ceil(1 / self.densities[0])} tokens or more"
            )
        unit = math.lcm(self.multiple, multiple)
        return tuple(min(-(-count // unit) * unit, num_tokens) for count in counts)

    def stage_tokens(self, grid: Sequence[int], num_forced: int = 0, multiple: int = 1) -> tuple[int, ...]:
        """Returns the number of tokens that enter the network in each stage on a grid; exact for pooled stages too.

        A pooled stage has the tokens of the reduced picture, with sides rounded up, whether tokens are forced or not.

        Args:
            grid: (h, w) or (t, h, w).
            num_forced: As in `token_counts`.
            multiple: As in `token_counts`.

        Raises:
            ConfigError: As `token_counts`, and if the tokens of a pooled stage are not a multiple.
        """
        counts = self.token_counts(math.prod(grid), num_forced, multiple)
        return tuple(
            count if self.pooling_of(stage) == 1 else self._pooled_tokens(grid, self.pooling_of(stage), multiple)
            for stage, count in enumerate(counts)
        )

    def _pooled_tokens(self, grid: Sequence[int], factor: int, multiple: int) -> int:
        count, unit = pooled_count(grid, factor), math.lcm(self.multiple, multiple)
        if count % unit:
            sizes = " or ".join("x".join(map(str, size)) for size in self.sizes_near(grid, multiple))
            raise ConfigError(
                f"stage_tokens: a picture pooled by {factor} must have a multiple of {unit} tokens, because the "
                f"model divides them among ranks or pads them, got {count} of {'x'.join(map(str, grid))}; choose "
                f"another size, in tokens for example {sizes}, or a configuration without pooling"
            )
        return count

    def sizes_near(self, grid: Sequence[int], multiple: int = 1) -> tuple[tuple[int, ...], ...]:
        """Returns the grids nearest to `grid` on which the token count of every stage is a multiple.

        One side changes, each way, by as little as possible; `grid` itself is not among them.

        Args:
            grid: (h, w) or (t, h, w).
            multiple: As in `token_counts`.
        """
        unit = math.lcm(self.multiple, multiple)
        factors = {self.pooling_of(stage) for stage in range(self.num_stages)}
        reach = range(1, unit * max(factors) + 1)  # a side that is a multiple of both always serves
        found = []
        for axis in (-2, -1):
            for sign in (-1, 1):
                sizes = (with_side(grid, axis, grid[axis] + sign * change) for change in reach)
                fits = (s for s in sizes if s[axis] > 0 and all(pooled_count(s, f) % unit == 0 for f in factors))
                found += [size for size in [next(fits, None)] if size is not None]
        return tuple(found)

    def replace(self, **overrides: Unpack[Overrides]) -> "JiTConfig":
        """Returns a copy with the named fields changed and validated; unknown names raise ConfigError.

        New densities define new stages, which do not pool unless `pooling` is given too.
        """
        check_fields("replace", overrides)
        changes: dict[str, Any] = {"pooling": ()} if "densities" in overrides else {}
        return dataclasses.replace(self, **{**changes, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dict of numbers, strings and lists, ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "JiTConfig":
        """Returns the configuration that `to_dict` wrote; fields with a default may be missing."""
        if not isinstance(fields, Mapping):
            raise ConfigError(
                f"from_dict: fields must be a mapping as to_dict returns it, got {type(fields).__name__}; "
                f"parse JSON first"
            )
        check_fields("from_dict", fields)
        missing = [name for name in ("densities", "boundaries", "steps") if name not in fields]
        if missing:
            raise ConfigError(f"from_dict: fields must hold {', '.join(missing)}, got {sorted(fields)}; add them")
        return cls(**fields)
