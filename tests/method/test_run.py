"""One generation without model code, with an artificial network."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jitaccel import PRESETS, ConfigError, JiTConfig, NonFiniteVelocityError, noise_levels
from jitaccel.method.importance import importance
from jitaccel.method.lift import lift
from jitaccel.method.run import Run, image_generators, state_seeds
from jitaccel.method.steps import KnownLevels
from jitaccel.tokens import gather_tokens
from tests.support.made_up import GRID, NUM_TOKENS, Network, drive, network, noise
from tests.support.reference import clean_estimate, target_state

SEVEN = PRESETS["7x-paper"]



def at_boundary(config: JiTConfig, state: Tensor, **given: Any) -> tuple[Run, KnownLevels, int, Tensor, Tensor, Tensor]:
    """Returns a run about to enter its second stage: run, clock, step, state, and the last one's state and velocity."""
    levels = noise_levels(config)
    clock = KnownLevels(config, levels)
    run = Run(config, GRID, clock.step(0), state, **given)
    first = config.stage_ends(clock.num_steps)[0]
    before = velocity = state
    for i in range(first):
        before = state
        velocity = run.leave(clock.step(i), state, network(run.gather(state), run.anchors, levels[i]))
        state = state + (levels[i + 1] - levels[i]) * velocity
    return run, clock, first, state, before, velocity


def test_same_bits_give_the_same_anchors() -> None:
    step = KnownLevels(SEVEN, noise_levels(SEVEN)).step(0)
    first, again = (Run(SEVEN, GRID, step, noise(3)) for _ in range(2))
    assert torch.equal(first.anchors, again.anchors)
    assert not torch.equal(first.anchors[0], first.anchors[1])


def test_other_bits_give_other_anchors() -> None:
    state = noise()
    other = state.clone()
    other[0, -1, -1] = torch.nextafter(other[0, -1, -1], torch.tensor(torch.inf))
    step = KnownLevels(SEVEN, noise_levels(SEVEN)).step(0)
    assert not torch.equal(Run(SEVEN, GRID, step, state).anchors, Run(SEVEN, GRID, step, other).anchors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_seed_is_of_the_bits_and_not_of_the_layout(dtype: torch.dtype) -> None:
    state = noise(3).to(dtype)
    strided = state.transpose(1, 2).contiguous().transpose(1, 2)
    assert state_seeds(strided) == state_seeds(state)
    assert state_seeds(state[1:2]) == state_seeds(state)[1:2]
    assert len(set(state_seeds(state))) == 3
    assert all(0 <= seed < 2**63 for seed in state_seeds(state))
    swapped = state.clone()
    swapped[:, [0, 1]] = state[:, [1, 0]]
    assert not set(state_seeds(swapped)) & set(state_seeds(state))


@pytest.mark.parametrize(
    "overrides",
    [{}, {"micro_flow": "exact"}, {"micro_flow": "exact", "noise": "own"}, {"lifter": "clean", "micro_flow": "none"}],
    ids=["released", "exact", "own", "clean, none"],
)
def test_image_of_a_batch_is_the_image_alone(overrides: dict[str, Any]) -> None:
    config, state = SEVEN.replace(**overrides), noise(3)
    anchors: dict[int, list[Tensor]] = {}

    def note(run: Run, *_: object) -> None:
        anchors.setdefault(len(run.anchors), []).append(run.anchors)

    together = drive(config, state, visit=note)
    for image in range(3):
        anchors.pop(1, None)
        alone = drive(config, state[image : image + 1], visit=note)
        assert all(torch.equal(a[image], b[0]) for a, b in zip(anchors[3], anchors[1], strict=True))
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[image], b[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lifter", ["velocity", "clean"])
def test_anchors_keep_their_velocity_bit_for_bit(lifter: str) -> None:
    steps = []

    def check(run: Run, index: int, _: Tensor, values: Tensor, velocity: Tensor) -> None:
        steps.append(index)
        assert velocity.shape == (2, NUM_TOKENS, 3)
        assert torch.equal(gather_tokens(velocity, run.anchors), values)

    drive(SEVEN.replace(lifter=lifter), noise(2), visit=check)
    assert steps == list(range(11))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_any_number_of_stages_runs_with_its_token_counts(num_stages: int) -> None:
    shares = tuple((i + 1) / num_stages for i in range(num_stages))
    config = JiTConfig(densities=shares, boundaries=shares, steps=9)
    counts = config.token_counts(NUM_TOKENS)
    seen: list[Tensor] = []
    states = drive(config, noise(2), visit=lambda run, *_: seen.append(run.anchors))
    assert [a.shape[1] for a in seen] == [counts[config.stage_of_step(i, 9)] for i in range(9)]
    assert all(state.isfinite().all() for state in states)
    for before, after in pairwise(seen):
        for image in range(2):
            assert set(before[image].tolist()) <= set(after[image].tolist())


def test_two_stages_may_start_at_one_step() -> None:
    config = JiTConfig(densities=(0.3, 0.6, 1.0), boundaries=(0.3, 0.6, 1.0), steps=6, micro_flow="exact")
    run, clock, _, state, _, _ = at_boundary(config, noise())
    entered = run.enter(clock.step(5), state)
    assert run.is_dense and run.stage == 2 and entered.isfinite().all()


def test_density_one_is_the_plain_sampler_bit_for_bit() -> None:
    # Densities rise strictly, and yet give every token twice: two stages, both dense, one boundary.
    config = JiTConfig(densities=(1.0 - 1e-12, 1.0), boundaries=(0.5, 1.0), steps=6, micro_flow="exact")
    levels, every = noise_levels(config), torch.arange(NUM_TOKENS).expand(2, -1)
    state = noise(2)
    states = drive(config, state)
    for i, actual in enumerate(states):
        state = state + (levels[i + 1] - levels[i]) * network(state, every, levels[i])
        assert torch.equal(actual, state)


@pytest.mark.parametrize("overrides", [{}, {"micro_flow": "exact"}, {"lifter": "clean"}, {"noise": "own"}])
def test_nobodys_tensor_is_written(overrides: dict[str, Any]) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(_run: Run, _index: int, *tensors: Tensor) -> None:
        kept.extend((tensor, tensor.clone()) for tensor in tensors)

    drive(SEVEN.replace(**overrides), noise(2), visit=keep)
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)


@pytest.mark.parametrize("overrides", [{}, {"micro_flow": "exact", "noise": "own"}, {"lifter": "clean"}])
def test_sampler_that_writes_in_place_gets_the_same_images(overrides: dict[str, Any]) -> None:
    config = SEVEN.replace(**overrides)
    levels = noise_levels(config)
    clock = KnownLevels(config, levels)
    expected = drive(config, noise(2))[-1]
    state = noise(2)
    run = Run(config, GRID, clock.step(0), state)
    for i in range(clock.num_steps):
        state.copy_(run.enter(clock.step(i), state))
        velocity = run.leave(clock.step(i), state, network(run.gather(state), run.anchors, levels[i]))
        state.add_(velocity.mul_(levels[i + 1] - levels[i]))
    torch.testing.assert_close(state, expected, rtol=1e-6, atol=1e-6)


def test_global_random_state_is_neither_read_nor_written() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index] # noqa: NPY002
    first = drive(SEVEN, noise())[-1]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index] # noqa: NPY002
    assert random.getstate() == before[2]
    torch.manual_seed(2)
    assert torch.equal(drive(SEVEN, noise())[-1], first)


def broken_at(*steps: int) -> Network:
    calls = iter(range(100))

    def with_nan(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        values = network(tokens, anchors, level)
        if next(calls) in steps:
            values[0, 0, 0] = torch.inf
        return values

    return with_nan


@pytest.mark.parametrize(("steps", "named"), [((2, 3), 2), ((3,), 3), ((5,), 5), ((10,), 10)])
def test_velocity_that_is_not_finite_is_named_by_its_first_step(steps: tuple[int, ...], named: int) -> None:
    done: list[int] = []
    with pytest.raises(NonFiniteVelocityError, match=f"at step {named};.*bfloat16"):
        drive(SEVEN, noise(), broken_at(*steps), visit=lambda _run, index, *_: done.append(index))
    ends = (3, 6, 10)
    assert done[-1] == min(end for end in ends if end >= named)  # before tokens are ranked, and at the end


def test_check_finite_forgets_what_it_has_checked() -> None:
    run, *_ = at_boundary(SEVEN, noise())
    run.check_finite()
    run.check_finite()


@pytest.mark.parametrize(("micro_flow", "weight"), [("none", 0.0), ("released", 0.25), ("exact", 1.0)])
def test_micro_flow_moves_the_new_tokens_alone(micro_flow: str, weight: float) -> None:
    config = SEVEN.replace(micro_flow=micro_flow, relax_steps=4)
    fresh = noise(2, seed=70)
    run, clock, index, state, before, velocity = at_boundary(config, noise(2), noise=fresh)
    plan, level = run.plan, clock.levels[index]
    clean = gather_tokens(clean_estimate(before, velocity, clock.levels[index - 1]), plan.anchors)
    target = target_state(clean, plan, fresh, level)
    entered = run.enter(clock.step(index), state)
    for image in range(2):
        new = sorted(set(run.anchors[image].tolist()) - set(plan.anchors[image].tolist()))
        old = sorted(set(range(NUM_TOKENS)) - set(new))
        assert len(new) == config.token_counts(NUM_TOKENS)[1] - plan.anchors.shape[1]
        expected = (1 - weight) * state[image, new] + weight * target[image, new]
        assert torch.equal(entered[image, old], state[image, old])
        torch.testing.assert_close(entered[image, new], expected, rtol=1e-6, atol=1e-6)
    if micro_flow == "none":
        assert entered is state


def test_activated_tokens_are_the_most_important_of_the_last_velocity() -> None:
    run, clock, index, state, _, velocity = at_boundary(SEVEN, noise(2))
    old = run.anchors
    scores = importance(velocity, GRID)
    run.enter(clock.step(index), state)
    for image in range(2):
        new = list(set(run.anchors[image].tolist()) - set(old[image].tolist()))
        left = list(set(range(NUM_TOKENS)) - set(run.anchors[image].tolist()))
        assert scores[image, new].min() >= scores[image, left].max()


def test_own_noise_is_the_state_that_the_image_started_from() -> None:
    config = SEVEN.replace(micro_flow="exact", noise="own")
    first = noise(2)
    run, clock, index, state, before, velocity = at_boundary(config, first)
    plan, level = run.plan, clock.levels[index]
    clean = gather_tokens(clean_estimate(before, velocity, clock.levels[index - 1]), plan.anchors)
    entered = run.enter(clock.step(index), state)
    expected = target_state(clean, plan, first, level)
    for image in range(2):
        new = sorted(set(run.anchors[image].tolist()) - set(plan.anchors[image].tolist()))
        torch.testing.assert_close(entered[image, new], expected[image, new], rtol=1e-6, atol=1e-6)


def test_own_noise_below_level_one_is_refused() -> None:
    config = SEVEN.replace(noise="own", schedule=(0.9, 0.6, 0.3, 0.0), steps=3, boundaries=(0.34, 0.67, 1.0))
    step = KnownLevels(config, noise_levels(config)).step(0)
    with pytest.raises(ConfigError, match=r'noise must be "fresh".*"own" at level 0\.9'):
        Run(config, GRID, step, noise())


def test_fresh_noise_is_standard_normal_of_each_image_and_drawn_once() -> None:
    config = SEVEN.replace(micro_flow="exact")
    run, clock, index, state, *_ = at_boundary(config, noise(2))
    run.enter(clock.step(index), state)
    drawn = run._noise
    assert drawn is not None and drawn.shape == state.shape
    assert abs(float(drawn.mean())) < 0.1 and abs(float(drawn.std()) - 1.0) < 0.1
    assert float((drawn[0] - drawn[1]).abs().max()) > 1.0
    assert float((drawn - noise(2)).abs().max()) > 1.0
    run.leave(clock.step(index + 2), state, network(run.gather(state), run.anchors, 0.5))
    run.enter(clock.step(index + 3), state)
    assert run._noise is drawn


def test_clean_lifter_gives_the_other_tokens_a_lifted_clean_estimate() -> None:
    levels = noise_levels(SEVEN)

    def check(run: Run, index: int, state: Tensor, values: Tensor, velocity: Tensor) -> None:
        at_anchors = run.gather(state) - levels[index] * values
        torch.testing.assert_close(state - levels[index] * velocity, lift(at_anchors, run.plan), rtol=1e-5, atol=1e-5)

    drive(SEVEN.replace(lifter="clean"), noise(2), visit=check)


def test_gather_and_scatter_invert_each_other() -> None:
    run = Run(SEVEN, GRID, KnownLevels(SEVEN, noise_levels(SEVEN)).step(0), noise(2))
    values = torch.randn(2, run.num_active, 5, generator=torch.Generator().manual_seed(0))
    full = run.scatter(values)
    assert full.shape == (2, NUM_TOKENS, 5)
    assert torch.equal(run.gather(full), values)
    assert int((full != 0).any(dim=2).sum()) == 2 * run.num_active


def test_shared_anchors_are_told_from_anchors_of_each_image() -> None:
    step = KnownLevels(SEVEN, noise_levels(SEVEN)).step(0)
    assert Run(SEVEN, GRID, step, noise(1)).has_shared_anchors
    assert Run(SEVEN, GRID, step, noise(1).expand(2, -1, -1)).has_shared_anchors
    assert not Run(SEVEN, GRID, step, noise(2)).has_shared_anchors


@pytest.mark.parametrize("shape", [(1, NUM_TOKENS - 1, 3), (NUM_TOKENS, 3), (1, 4, 12, 10)])
def test_state_of_another_grid_is_refused(shape: tuple[int, ...]) -> None:
    step = KnownLevels(SEVEN, noise_levels(SEVEN)).step(0)
    with pytest.raises(ValueError, match=rf"state must be \(B, {NUM_TOKENS}, D\) for a grid of 12x10"):
        Run(SEVEN, GRID, step, torch.zeros(shape))


def test_stage_cannot_start_before_a_step_was_left() -> None:
    clock = KnownLevels(SEVEN, noise_levels(SEVEN))
    run = Run(SEVEN, GRID, clock.step(0), noise())
    with pytest.raises(RuntimeError, match="a step must be left before stage 1 starts"):
        run.enter(clock.step(4), noise())


def test_generators_are_of_the_cpu_and_of_each_image() -> None:
    generators = image_generators(noise(2))
    assert [generator.device.type for generator in generators] == ["cpu", "cpu"]
    assert [generator.initial_seed() for generator in generators] == state_seeds(noise(2))


def test_importance_that_is_not_finite_names_the_step() -> None:
    clock, state = KnownLevels(SEVEN, noise_levels(SEVEN)), noise()
    run = Run(SEVEN, GRID, clock.step(0), state)
    step = next(clock.step(i) for i in range(clock.num_steps) if clock.step(i).may_end_stage)
    run.enter(step, state)
    run.leave(step, state, run.gather(state) * 1e25)  # finite, and its square is not
    with pytest.raises(NonFiniteVelocityError, match=rf"finite importance.* \(step {step.index}\)"):
        run.enter(clock.step(step.index + 1), state)
