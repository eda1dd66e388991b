"""Pooled stages: the mean of a state is a state of the smaller picture, whose result gives every token's velocity."""

import math

import pytest
import torch
from torch import Tensor

from jitaccel.errors import ConfigError
from jitaccel.method.config import JiTConfig
from jitaccel.method.grid import num_tokens_of
from jitaccel.method.pool import make_pooled_plan, pooled_grid, pooled_level
from jitaccel.method.run import Run
from jitaccel.method.schedule import noise_levels
from jitaccel.method.solver import extrapolation_weight
from jitaccel.method.steps import KnownLevels

POOLED = JiTConfig(
    densities=(0.25, 1.0), boundaries=(0.5, 1.0), steps=4, pooling=(2, 1), lifter="clean", solver="dpmpp_2m"
)


def tokens_of(latents: Tensor, patch: int) -> Tensor:
    """Returns (B, C, H, W) as tokens, one latent at a time, in the documented layout of `pool`."""
    batch, channels, height, width = latents.shape
    rows = []
    for i in range(height // patch):
        for j in range(width // patch):
            block = latents[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            rows.append(block.reshape(batch, channels * patch * patch))
    return torch.stack(rows, dim=1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("level", [1.0, 0.93, 0.4, 0.02])
def test_mean_of_a_state_is_a_state_of_the_smaller_picture_at_the_pooled_level(factor: int, level: float) -> None:
    clean, eps = noise(1, 3, 16, 24, seed=1), noise(1, 3, 16, 24, seed=2)
    state = (1 - level) * clean + level * eps
    plan = make_pooled_plan(1, (8, 12), factor, 2, torch.device("cpu"))
    small_level = pooled_level(level, factor)
    mean = torch.nn.functional.avg_pool2d
    expected = (1 - small_level) * mean(clean, factor) + small_level * factor * mean(eps, factor)
    torch.testing.assert_close(plan.show(tokens_of(state, 2), level), tokens_of(expected, 2))


def test_noise_that_is_pooled_has_unit_variance() -> None:
    plan = make_pooled_plan(1, (64, 64), 2, 2, torch.device("cpu"))
    shown = plan.show(noise(1, 64 * 64, 64), 1.0)
    assert shown.std().item() == pytest.approx(1.0, abs=0.01)
    assert shown.mean().item() == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("grid", [(8, 12), (3, 6, 4)])
@pytest.mark.parametrize("patch", [1, 2])
def test_velocity_of_a_flat_picture_is_exact(grid: tuple[int, ...], patch: int) -> None:
    """A picture without detail is known from its means: the velocity is noise minus picture at every token."""
    level, channels = 0.6, 3 * patch**2
    clean = noise(2, 1, 3, 1, seed=3).expand(2, num_tokens_of(grid), 3, patch**2).flatten(2)
    eps = noise(2, num_tokens_of(grid), channels, seed=4)
    state = (1 - level) * clean + level * eps
    plan = make_pooled_plan(2, grid, 2, patch, torch.device("cpu"))
    small = num_tokens_of(pooled_grid(grid, 2))
    at_small = (plan.show(state, level) - clean[:, :small]) / plan.show_level(level)
    torch.testing.assert_close(plan.lift(at_small, state, level), eps - clean)


def test_clean_estimate_is_brought_up_bilinearly_within_each_frame() -> None:
    grid, level = (2, 4, 4), 0.5
    plan = make_pooled_plan(1, grid, 2, 1, torch.device("cpu"))
    state = torch.zeros(1, 32, 1, dtype=torch.float64)
    # The first frame is a ramp of columns, 0 and 8, the second is flat: 100.
    clean = torch.tensor([0.0, 8.0, 0.0, 8.0] + [100.0] * 4, dtype=torch.float64).view(1, 8, 1)
    velocity = plan.lift(-clean / pooled_level(level, 2), state, level)
    lifted = -level * velocity.view(2, 4, 4)
    torch.testing.assert_close(lifted[0], torch.tensor([0.0, 2.0, 6.0, 8.0], dtype=torch.float64).expand(4, 4))
    torch.testing.assert_close(lifted[1], torch.full((4, 4), 100.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("grid", "patch", "factor"), [((5, 7), 2, 2), ((5, 7), 1, 2), ((5, 6), 2, 4), ((2, 3, 9), 2, 4)]
)
def test_odd_sides_are_rounded_up_and_nothing_beyond_them_is_looked_at(
    grid: tuple[int, ...], patch: int, factor: int
) -> None:
    plan = make_pooled_plan(1, grid, factor, patch, torch.device("cpu"))
    small = pooled_grid(grid, factor)
    assert small == (*grid[:-2], math.ceil(grid[-2] / factor), math.ceil(grid[-1] / factor))
    state = noise(1, num_tokens_of(grid), 4 * patch**2)
    shown = plan.show(state, 0.7)
    assert shown.shape == (1, num_tokens_of(small), 4 * patch**2) == plan.anchors.shape + shown.shape[2:]
    assert plan.lift(torch.zeros_like(shown), state, 0.7).shape == state.shape
    flat = plan.show_beside(torch.ones_like(state))
    torch.testing.assert_close(flat, torch.ones_like(flat))


def test_features_of_blocks_come_back() -> None:
    plan = make_pooled_plan(2, (2, 5, 7), 2, 2, torch.device("cpu"))
    features = noise(2, 2 * 3 * 4, 6)
    torch.testing.assert_close(plan.show_features(plan.spread(features)), features)


def test_positions_are_the_smaller_pictures_own() -> None:
    plan = make_pooled_plan(1, (2, 4, 6), 2, 2, torch.device("cpu"))
    frame, row, column = torch.unravel_index(plan.positions[0], (2, 4, 6))
    expected = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3))
    assert torch.equal(torch.stack([frame, row, column], dim=1), expected)


def picture(state: Tensor, level: float) -> Tensor:
    """The velocity of a network that knows the picture: all zeros."""
    return state / level


def run_through(config: JiTConfig, grid: tuple[int, ...], state: Tensor, patch: int) -> tuple[Run, Tensor]:
    clock = KnownLevels(config, noise_levels(config))
    run = Run(config, grid, clock.step(0), state, patch=patch)
    for index in range(clock.num_steps):
        step = clock.step(index)
        entered = run.enter(step, state)
        velocity = run.leave(step, entered, picture(run.show(entered), run.shown_level))
        state = entered + (step.next_level - step.noise_level) * velocity
    return run, state


@pytest.mark.parametrize(
    ("pooling", "densities"),
    [
        ((2, 1), (0.25, 1.0)),
        ((4, 2, 1), (0.0625, 0.25, 1.0)),
        ((2, 1, 1), (0.25, 0.6, 1.0)),
        ((1, 2, 1), (0.2, 0.25, 1.0)),
    ],
)
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_a_network_that_knows_the_picture_reaches_it_whatever_is_pooled(
    pooling: tuple[int, ...], densities: tuple[float, ...], solver: str
) -> None:
    bounds = tuple((k + 1) / len(pooling) for k in range(len(pooling)))
    config = POOLED.replace(
        densities=densities, boundaries=bounds, steps=6, pooling=pooling, solver=solver, micro_flow="exact"
    )
    run, end = run_through(config, (6, 8), noise(2, 48, 12).float(), 2)
    assert run.is_dense
    assert end.abs().max().item() < 1e-5


def test_nothing_moves_and_nothing_is_drawn_where_a_pooled_stage_ends() -> None:
    config = POOLED.replace(micro_flow="exact", noise="fresh")
    state = noise(1, 48, 12).float()
    clock = KnownLevels(config, noise_levels(config))
    run = Run(config, (6, 8), clock.step(0), state, patch=2)
    before = [generator.get_state() for generator in run.generators]
    for index in (0, 1):
        run.leave(clock.step(index), run.enter(clock.step(index), state), torch.ones(1, 12, 12))
    assert run.enter(clock.step(2), state) is state
    assert run.is_dense
    assert all(torch.equal(generator.get_state(), old) for generator, old in zip(run.generators, before, strict=True))


def test_a_subset_after_a_pooled_stage_is_the_lattice_and_what_is_most_important() -> None:
    config = POOLED.replace(densities=(0.25, 0.7, 1.0), boundaries=(0.4, 0.7, 1.0), steps=6, pooling=(2, 1, 1))
    grid = (8, 10)
    clock = KnownLevels(config, noise_levels(config))
    state = noise(1, 80, 4).float()
    run = Run(config, grid, clock.step(0), state, patch=2)
    busy = torch.zeros(1, 20, 4)
    busy[0, 7] = torch.tensor([3.0, -3.0, 3.0, -3.0])  # rows 2 and 3, columns 4 and 5 of the whole picture
    for index in (0, 1):
        run.leave(clock.step(index), run.enter(clock.step(index), state), busy)
    run.enter(clock.step(2), state)
    assert run.num_active == 56
    chosen = torch.zeros(80, dtype=torch.bool)
    chosen[run.anchors[0]] = True
    chosen = chosen.view(grid)
    assert chosen[::2, ::2].all() and chosen[0].all() and chosen[:, -1].all()
    assert chosen[2:4, 4:6].all()


def test_a_configuration_with_pooling_goes_through_its_dict_and_pools_nothing_by_default() -> None:
    assert JiTConfig.from_dict(POOLED.to_dict()) == POOLED
    assert POOLED.to_dict()["pooling"] == [2, 1]
    assert POOLED.replace(densities=(0.3, 1.0), pooling=[1, 1]).pooling == ()
    assert [POOLED.pooling_of(stage) for stage in (0, 1)] == [2, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pooling": (2,)}, "pooling must have one factor for each of densities"),
        ({"pooling": (3, 1)}, "pooling must be a tuple of 1, 2, 4"),
        ({"pooling": 2}, "pooling must be a tuple of 1, 2, 4"),
        ({"pooling": (2.0, 1)}, "pooling must be a tuple of 1, 2, 4"),
        ({"densities": (0.3, 1.0), "pooling": (2, 1)}, "must have density 0.25"),
        ({"pooling": (2, 2)}, "must have density 0.25"),
    ],
)
def test_pooling_that_does_not_fit_is_refused_with_what_would(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        POOLED.replace(**changes)


def test_tokens_of_pooled_stages_are_those_of_the_smaller_picture() -> None:
    config = POOLED.replace(densities=(0.0625, 0.25, 1.0), boundaries=(0.2, 0.5, 1.0), pooling=(4, 2, 1), steps=8)
    assert config.stage_tokens((64, 64)) == (256, 1024, 4096)
    assert config.stage_tokens((5, 5, 7)) == (5 * 2 * 2, 5 * 3 * 4, 175)
    assert config.stage_tokens((64, 64), num_forced=100) == (256, 1024, 4096)
    with pytest.raises(ConfigError, match="must have a multiple of 3 tokens"):
        config.stage_tokens((64, 64), multiple=3)


@pytest.mark.parametrize(("own", "given"), [(1, 2), (2, 1), (1, 3), (2, 3), (8, 1)])
def test_size_that_ranks_cannot_divide_is_refused_with_sizes_that_work(own: int, given: int) -> None:
    """A side of 17 pools to 9 by 2, to 5 by 4."""
    config = POOLED.replace(
        densities=(0.0625, 0.25, 1.0), boundaries=(0.2, 0.5, 1.0), pooling=(4, 2, 1), steps=8, multiple=own
    )
    with pytest.raises(ConfigError, match=f"must have a multiple of {own * given} tokens") as raised:
        config.stage_tokens((17, 29), multiple=given)
    sizes = config.sizes_near((17, 29), given)
    assert len(sizes) >= 2 and all("x".join(map(str, size)) in str(raised.value) for size in sizes)
    for size in sizes:
        assert all(count % (own * given) == 0 for count in config.stage_tokens(size, multiple=given))
        assert [a == b for a, b in zip(size, (17, 29), strict=True)].count(True) == 1


def test_extrapolation_goes_across_the_end_of_a_pooled_stage() -> None:
    config = POOLED.replace(steps=6)
    clock = KnownLevels(config, noise_levels(config))
    state = noise(1, 48, 12).float()
    run = Run(config, (6, 8), clock.step(0), state, patch=2)
    clean = []
    for index in range(4):
        step = clock.step(index)
        run.enter(step, state)
        velocity = noise(1, run.num_active, 12, seed=index).float()
        lifted = run.plan.lift(velocity, state, step.noise_level, "clean")
        clean.append(state - step.noise_level * lifted)
        stepped = run.leave(step, state, velocity)
        weight = extrapolation_weight(*(clock.levels[index - 1 : index + 2])) if index else 0.0
        expected = clean[-1] + (weight * (clean[-1] - clean[-2]) if index else 0.0)
        torch.testing.assert_close(state - step.noise_level * stepped, expected, rtol=1e-4, atol=1e-4)
        state = state + (step.next_level - step.noise_level) * stepped


def test_after_a_pooled_stage_only_anchors_of_a_subset_extrapolate() -> None:
    config = POOLED.replace(densities=(0.25, 0.6, 1.0), boundaries=(0.4, 0.7, 1.0), pooling=(2, 1, 1), steps=6)
    clock = KnownLevels(config, noise_levels(config))
    state = noise(1, 48, 12).float()
    run = Run(config, (6, 8), clock.step(0), state, patch=2)
    for index in range(2):
        run.leave(clock.step(index), run.enter(clock.step(index), state), noise(1, 12, 12, seed=index).float())
    step = clock.step(2)
    run.enter(step, state)
    values = noise(1, run.num_active, 12, seed=9).float()
    plain = run.plan.lift(values, state, step.noise_level, "clean")
    changed = (run.leave(step, state, values) != plain).any(dim=2)[0]
    assert sorted(changed.nonzero().flatten().tolist()) == run.anchors[0].tolist()
