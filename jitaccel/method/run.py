"""The state of one generation. Combines anchors, lift, importance and micro-flow; knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError, NonFiniteVelocityError, UnsupportedModelError
from ..tokens import gather_tokens, scatter_tokens
from .anchors import first_anchors, merge_anchors
from .config import JiTConfig
from .grid import lattice, name_of, num_tokens_of
from .importance import importance
from .lift import LiftPlan, make_lift_plan
from .microflow import micro_flow
from .pool import PooledPlan, make_pooled_plan
from .solver import make_solver
from .steps import Step


@dataclass(frozen=True, kw_only=True)
class Left:
    """The state, full velocity and level that the last step left for the next stage (`_p` in the method)."""

    state: Tensor
    velocity: Tensor
    noise_level: float


def importance_of(run: Run, left: Left) -> Tensor:
    """Returns the local variance of the last full velocity, (B, N) float32 (ITA, arXiv:2603.10744)."""
    return importance(left.velocity, run.grid, run.config.importance_window)


def lifted(run: Run, step: Step, state: Tensor, values: Tensor) -> Tensor:
    """Returns the velocity at every token, (B, N, D), as the stage and `JiTConfig.lifter` define it."""
    return run.plan.lift(values, state, step.noise_level, run.config.lifter, run.shown_of(state))


def moved(run: Run, step: Step, state: Tensor, left: Left, tokens: Tensor, old: LiftPlan) -> Tensor:
    """Returns a new `state` with the activated `tokens` (B, count) moved towards their target: `micro_flow`."""
    noise, levels = run.target_noise(state), (left.noise_level, step.noise_level)
    return micro_flow(state, left.state, left.velocity, noise, tokens, old, levels, run.config.move_weight)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a run that a variant of the method can replace.

    scores: (run, left) -> (B, N) float32, by which tokens are activated; called only if some tokens, not all, are.
    lift: (run, step, state, values (B, M, D)) -> the velocity at every token, (B, N, D).
    move: (run, step, state, left, tokens (B, count), plan before activation) -> a new state.
    """

    scores: Callable[[Run, Left], Tensor] = importance_of
    lift: Callable[[Run, Step, Tensor, Tensor], Tensor] = lifted
    move: Callable[[Run, Step, Tensor, Left, Tensor, LiftPlan], Tensor] = moved


class Run:
    """One generation: `enter` a step with the state, run the network at `anchors`, `leave` with its velocity.

    All random choices for an image (extra first anchors, fresh noise) come from a generator seeded by the bits of that
    image's first state, hence from the caller's own generator. The global generator is neither read nor written, and an
    image in a batch gets the same choices as alone. (The released code draws both from global generators, once for the
    whole batch.)

    `noise_level` is that of the step entered last. `generators` holds one generator per image.

    Args:
        config: The configuration.
        grid: The token grid.
        step: The first step.
        state: (B, N, D), the first state of the generation.
        anchors: Given only to replay a recorded generation.
        noise: Given only to replay a recorded generation.
        forced: (B, N) bool, tokens that are anchors from the first stage on (a mask); densities are shares of the rest.
        multiple: Numbers of anchors are rounded up to a multiple of this.
        patch: Latents along a token's side, which pooled stages average; a token holds them channel by channel.
        parts: Replacements by a variant of the method (`benchmarks/lab`).

    Raises:
        ConfigError: For token counts that the grid cannot have, and for own noise if the first level is below 1.
        UnsupportedModelError: If the images' masks would give them stages with different numbers of tokens.
    """

    def __init__(
        self,
        config: JiTConfig,
        grid: tuple[int, ...],
        step: Step,
        state: Tensor,
        *,
        anchors: Tensor | None = None,
        noise: Tensor | None = None,
        forced: Tensor | None = None,
        multiple: int = 1,
        patch: int = 1,
        parts: Parts = Parts(),
    ) -> None:
        num_tokens = num_tokens_of(grid)
        if state.ndim != 3 or state.shape[1] != num_tokens:
            raise ValueError(
                f"Run: state must be (B, {num_tokens}, D) for a grid of {name_of(grid)}, got "
                f"{tuple(state.shape)}; pass position ids and tokens of the same picture"
            )
        if config.noise == "own" and config.num_stages > 1 and step.noise_level < 1.0:
            raise ConfigError(
                f'Run: noise must be "fresh" if the first level is below 1, got "own" at level '
                f"{step.noise_level:g}; the state is no longer the noise it started from"
            )
        self.config, self.grid, self.stage = config, grid, step.stage
        self.noise_level = step.noise_level
        self._counts = stage_tokens_of(config, grid, forced, multiple)
        self._forced, self._patch = forced, patch
        self._parts = parts
        self.generators = image_generators(state)
        self._noise = state.clone() if noise is None and config.noise == "own" else noise
        self._left: Left | None = None
        self._last_step = step.index
        self._solver = make_solver(config.solver)
        self._finite: list[tuple[int, Tensor]] = []
        self._shown: tuple[Tensor, Tensor] | None = None  # a state of the step entered last, and `show` of it
        self._has_shared_anchors: bool | None
        self.plan: LiftPlan | PooledPlan
        if self.factor > 1:
            self._plan_pooled(state)
        else:
            own = self._first_anchors(state, self._counts[self.stage]) if anchors is None else anchors
            self._plan(own, is_checked=anchors is None)

    def _first_anchors(self, state: Tensor, count: int, image: int | None = None) -> Tensor:
        """Returns `count` anchors for each image, (B, count), before anything is known about the picture.

        image: the only image to choose for, (1, count); None for all.
        """
        masks = [None] * len(self.generators) if self._forced is None else self._forced.cpu().unbind(0)
        each = [*zip(self.generators, masks, strict=True)]
        drawn = [first_anchors(self.grid, count, g, m) for g, m in (each if image is None else [each[image]])]
        return torch.stack(drawn).to(state.device)

    def _plan(self, anchors: Tensor, is_checked: bool = True) -> None:
        """Computes everything that depends on the anchors alone, once per stage."""
        self.plan = make_lift_plan(anchors, self.grid, self.config.blur_scale, is_checked)
        self._has_shared_anchors = None

    def _plan_pooled(self, state: Tensor) -> None:
        self.plan = make_pooled_plan(state.shape[0], self.grid, self.factor, self._patch, state.device)
        self._has_shared_anchors = True

    @property
    def has_shared_anchors(self) -> bool:
        """Whether all images have the same anchors. With several images, waits for the device once per stage."""
        if self._has_shared_anchors is None:
            first, *others = self.anchors
            self._has_shared_anchors = not others or bool((self.anchors == first).all())
        return self._has_shared_anchors

    @property
    def factor(self) -> int:
        """The factor by which the stage reduces each side of the picture; 1 if it does not pool."""
        return self.config.pooling_of(self.stage)

    @property
    def anchors(self) -> Tensor:
        """The place of the network's values among all tokens, (B, M) int64, sorted: the tokens that enter it.

        In a pooled stage, the first token of each block that enters as one token.
        """
        return self.plan.anchors

    @property
    def is_dense(self) -> bool:
        """Whether every token is an anchor."""
        return self.plan.is_dense

    @property
    def num_active(self) -> int:
        """M, the number of anchors of each image."""
        return self.plan.anchors.shape[1]

    @property
    def shown_level(self) -> float:
        """The noise level at which the network sees the state of the step entered last."""
        return self.plan.show_level(self.noise_level)

    def show(self, state: Tensor) -> Tensor:
        """Returns what the network sees of a state (B, N, D) of the step entered last, (B, M, D)."""
        shown = self.plan.show(state, self.noise_level)
        self._shown = (state, shown)
        return shown

    def shown_of(self, state: Tensor) -> Tensor | None:
        """Returns what `show` returned for this state object in the step entered last; None if it was not called."""
        return self._shown[1] if self._shown is not None and self._shown[0] is state else None

    def show_beside(self, x: Tensor) -> Tensor:
        """Returns latents next to the state, such as a mask or another picture (B, N, C), as the network sees them."""
        return self.plan.show_beside(x)

    def show_features(self, x: Tensor) -> Tensor:
        """Returns features of whole tokens, such as ControlNet residuals (B, N, C), as the network sees them."""
        return self.plan.show_features(x)

    def gather(self, x: Tensor) -> Tensor:
        """Returns the anchors' tokens of `x` (B, N, ...), or `x` itself if every token is an anchor."""
        return x if self.is_dense else gather_tokens(x, self.anchors)

    def scatter(self, values: Tensor) -> Tensor:
        """Returns the anchors' `values` scattered into zeros, (B, N, ...), or `values` if every token is an anchor."""
        return values if self.is_dense else scatter_tokens(values, self.anchors, num_tokens_of(self.grid))

    def enter(self, step: Step, state: Tensor) -> Tensor:
        """Returns the state from which the network runs at `step`: `state`, with tokens moved where a stage begins.

        Importance-guided activation and the deterministic micro-flow (arXiv:2603.10744). `state` is not written.
        """
        self.noise_level, self._shown = step.noise_level, None
        while self.stage < step.stage:
            state = self._start_stage(step, state)
        return state

    def _start_stage(self, step: Step, state: Tensor) -> Tensor:
        left = self._left
        if left is None:
            raise RuntimeError(f"Run.enter: a step must be left before stage {self.stage + 1} starts, got none")
        self.stage += 1
        old = self.plan
        if isinstance(old, PooledPlan):
            # Every token has its own noise and a velocity at the right level, so none has to be moved.
            self._plan_after_pooled(left, state)
            return state
        tokens = self._activated(left, old.anchors)
        if self.factor > 1:
            self._plan_pooled(state)
        else:
            self._plan(merge_anchors(old.anchors, tokens))
        if self.config.move_weight == 0.0:
            return state
        return self._parts.move(self, step, state, left, tokens, old)

    def _plan_after_pooled(self, left: Left, state: Tensor) -> None:
        """Makes the plan of a stage that follows one in which every token was computed: the regular anchors, and the
        most important of the others."""
        if self.factor > 1:
            self.check_finite()
            self._plan_pooled(state)
            return
        regular = lattice(self.grid).expand(state.shape[0], -1)
        if self._forced is not None:
            regular = regular | self._forced.cpu()
        counts = [min(self._counts[self.stage], count) for count in regular.sum(dim=1).tolist()]
        if len(set(counts)) == 1:
            anchors = self._first_anchors(state, counts[0])
            self._plan(merge_anchors(anchors, self._activated(left, anchors)))
            return
        # Masks cover different numbers of regular places: each image gets the anchors that it would get alone.
        rows = []
        for image, count in enumerate(counts):
            anchors = self._first_anchors(state, count, image)
            alone = Left(
                state=left.state[image, None], velocity=left.velocity[image, None], noise_level=left.noise_level
            )
            rows.append(merge_anchors(anchors, self._activated(alone, anchors)))
        self._plan(torch.cat(rows))

    def _activated(self, left: Left, anchors: Tensor) -> Tensor:
        """Returns the tokens (B, count) that a stage activates in addition to `anchors` (B, M); all if it pools.

        They are ranked only if some, but not all, are activated.
        """
        inactive = num_tokens_of(self.grid) - anchors.shape[1]
        count = inactive if self.factor > 1 else self._counts[self.stage] - anchors.shape[1]
        if not 0 < count < inactive:
            self.check_finite()
            return ops.activate(torch.zeros_like(left.velocity[..., 0]).float(), anchors, count)
        scores = self._parts.scores(self, left)
        self.check_finite(scores)
        return ops.activate(scores, anchors, count)

    def target_noise(self, state: Tensor) -> Tensor:
        """Returns the standard normal noise of the targets, (B, N, D), fixed for the generation: the first state's own
        noise, or noise drawn from `generators` at the first call."""
        if self._noise is None:
            shape = state.shape[1:]
            drawn = [torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in self.generators]
            self._noise = torch.stack(drawn).to(state.device)
        return self._noise

    def leave(self, step: Step, state: Tensor, values: Tensor) -> Tensor:
        """Returns the velocity at every token, (B, N, D), from the network's `values` (B, M, D) at the anchors.

        Anchors keep their velocity bit for bit (consistency, arXiv:2603.10744), except for the correction of a solver
        beyond Euler. state: the one the network saw.
        """
        return self.remember(step, state, self.lift(step, state, values))

    def lift(self, step: Step, state: Tensor, values: Tensor) -> Tensor:
        """Returns the velocity at every token, (B, N, D), before the solver's correction. Stores nothing."""
        return self._parts.lift(self, step, state, values)

    def remember(self, step: Step, state: Tensor, velocity: Tensor) -> Tensor:
        """Stores copies of what later steps need of a full velocity, because samplers may write in place.

        Returns the velocity whose Euler step equals the solver's step; it differs from `velocity` only with `dpmpp_2m`.
        """
        self._last_step, self._shown = step.index, None
        self._finite.append((step.index, torch.isfinite(velocity).all()))
        if step.may_end_stage:
            self._left = Left(state=state.clone(), velocity=velocity.clone(), noise_level=step.noise_level)
        has_every_token = self.is_dense or self.factor > 1
        return self._solver.correct(step, state, velocity, None if has_every_token else self.anchors)

    @property
    def needs_every_step(self) -> bool:
        """Whether every step, not only the first of a stage, depends on the velocity of the previous one."""
        return self._solver.needs_every_step

    def before_solver(self, step: Step, state: Tensor, velocity: Tensor) -> Tensor:
        """Inverts `remember` for the step left last: returns the velocity it was given when it returned `velocity`."""
        return self._solver.uncorrect(step, state, velocity)

    def check_finite(self, scores: Tensor | None = None) -> None:
        """Raises NonFiniteVelocityError naming the first step since the last check that was not finite.

        Waits for the device, so it is called only where a stage starts and at the end. scores: (B, N), by which that
        stage chooses its tokens, checked in the same wait.
        """
        checked, self._finite = self._finite, []
        chosen = [] if scores is None else [torch.isfinite(scores).all()]
        if not checked and not chosen:
            return
        flags = torch.stack([*(flag for _, flag in checked), *chosen]).tolist()
        for (index, _), is_finite in zip(checked, flags[: len(checked)], strict=True):
            if not is_finite:
                raise NonFiniteVelocityError(
                    f"Run: the velocity must be finite, got NaN or infinity at step {index}; "
                    f"float16 overflows in some FLUX models, load it in bfloat16"
                )
        if not all(flags):
            level = "" if self._left is None else f" at noise level {self._left.noise_level:g}"
            raise NonFiniteVelocityError(
                f"Run: stage {self.stage} must activate tokens by finite importance, got NaN or infinity in "
                f"the step{level}, the last of stage {self.stage - 1} (step {self._last_step}); the model's velocity "
                f"overflowed, try bfloat16 or float32"
            )


def stage_tokens_of(
    config: JiTConfig, grid: tuple[int, ...], forced: Tensor | None, multiple: int = 1
) -> tuple[int, ...]:
    """Returns the number of tokens that each stage gives the network, the same for every image of a batch.

    Args:
        config: What runs.
        grid: The token grid.
        forced: (B, N) bool, tokens that are anchors in every stage, or None. If given, waits for the device.
        multiple: As in `JiTConfig.token_counts`.

    Raises:
        ConfigError: As `JiTConfig.stage_tokens` does.
        UnsupportedModelError: If masks of different sizes would give the images different numbers of tokens, so that a
            picture would differ from the one made alone.
    """
    numbers = [0] if forced is None else [int(number) for number in forced.sum(dim=1).tolist()]
    counts = {number: config.stage_tokens(grid, number, multiple) for number in numbers or [0]}
    if len(set(counts.values())) > 1:
        raise UnsupportedModelError(
            f"jitaccel: masks of a batch must cover equally many tokens in every image, got "
            f"{', '.join(map(str, numbers))} of {num_tokens_of(grid)}; make the images one after "
            f"the other, or give all of them the same mask"
        )
    return next(iter(counts.values()))


def image_generators(state: Tensor) -> list[torch.Generator]:
    """Returns one CPU generator for each image, seeded by the bits of its state (B, ...)."""
    generators = []
    for seed in state_seeds(state):
        generators.append(torch.Generator("cpu").manual_seed(seed))
    return generators


def state_seeds(state: Tensor) -> list[int]:
    """Returns a 63-bit number for each image (B, ...), the same for the same bits on every device.

    It is the sum of the bits of all values with odd weights that grow along the state, modulo 2^64. Waits for the
    device.
    """
    bits = state.detach().contiguous().flatten(1)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]
    words = bits.view(kind).long()
    position = torch.arange(words.shape[1], device=words.device)
    weights = (2 * position + 1) * 0x1E3779B97F4A7C15
    sums = (words * weights).sum(dim=1)
    return [int(value) & (2**63 - 1) for value in sums.tolist()]
