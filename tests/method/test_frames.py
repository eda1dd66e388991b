"""Grids of frames, (t, h, w): lift and importance work within a frame, and only activation compares frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from jitaccel import PRESETS, JiTConfig, noise_levels
from jitaccel.artefacts.manifest import manifest_tensors
from jitaccel.evaluation.pictures import show_active
from jitaccel.generation.stats import Recorder, summarize
from jitaccel.method.anchors import first_anchors
from jitaccel.method.grid import lattice, name_of, num_frames, num_tokens_of
from jitaccel.method.importance import importance
from jitaccel.method.lift import lift, make_lift_plan
from jitaccel.method.run import Run
from jitaccel.method.steps import KnownLevels
from jitaccel.tokens import gather_tokens

GRID = (3, 8, 6)
SIZE, NUM_TOKENS = 48, 144
TWO = JiTConfig(densities=(0.4, 1.0), boundaries=(0.5, 1.0), steps=6, micro_flow="exact")
THREE = PRESETS["7x-paper"].replace(micro_flow="exact")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(batch: int = 1, seed: int = 0, tokens: int = NUM_TOKENS) -> Tensor:
    return torch.randn(batch, tokens, 3, generator=generator(seed))


def network(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
    """A velocity of each token's own value and its place within the frame."""
    place = anchors % SIZE
    return tokens.tanh() * level + torch.sin(torch.stack([place // 6, place % 6, place], dim=-1) * 0.7)


def drive(
    config: JiTConfig, grid: tuple[int, ...], state: Tensor, anchors: Tensor | None = None, fresh: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Returns the last state, and the anchors of each step."""
    clock = KnownLevels(config, noise_levels(config))
    run = Run(config, grid, clock.step(0), state, anchors=anchors, noise=fresh)
    seen = []
    for index in range(clock.num_steps):
        step = clock.step(index)
        state = run.enter(step, state)
        seen.append(run.anchors)
        velocity = run.leave(step, state, network(run.gather(state), run.anchors, step.noise_level))
        state = state + (step.next_level - step.noise_level) * velocity
    run.check_finite()
    return state, seen


NAMED = [((4, 5), "4x5", 1), ((3, 4, 5), "3x4x5", 3), ((1, 4, 5), "1x4x5", 1)]


@pytest.mark.parametrize(("grid", "name", "frames"), NAMED)
def test_grid_tells_its_size_name_and_frames(grid: tuple[int, ...], name: str, frames: int) -> None:
    assert (num_tokens_of(grid), name_of(grid), num_frames(grid)) == (20 * frames, name, frames)


def test_lattice_of_each_frame_is_that_of_a_picture() -> None:
    regular = lattice(GRID)
    assert torch.equal(regular.view(3, SIZE), lattice(GRID[1:]).expand(3, -1))
    count = int(regular.sum())
    assert torch.equal(first_anchors(GRID, count), regular.nonzero().squeeze(1))
    more = first_anchors(GRID, count + 9, generator())
    assert len(more) == count + 9 and set(regular.nonzero().squeeze(1).tolist()) < set(more.tolist())


@pytest.mark.parametrize("count", [3, 4, 10, 60])
@pytest.mark.parametrize("seed", range(10))
def test_every_frame_keeps_an_anchor_however_few_there_are(count: int, seed: int) -> None:
    anchors = first_anchors(GRID, count, generator(seed))
    assert len(anchors) == len(anchors.unique()) == count
    assert torch.equal(anchors, anchors.sort().values) and set((anchors // SIZE).tolist()) == {0, 1, 2}


def test_forced_tokens_count_as_their_frames_anchors() -> None:
    forced = torch.zeros(NUM_TOKENS, dtype=torch.bool)
    forced[SIZE + 3 : SIZE + 8] = True
    anchors = first_anchors(GRID, 7, generator(), forced)
    assert (anchors // SIZE).bincount().tolist() == [1, 5, 1]
    with pytest.raises(ValueError, match="count must leave an anchor to each of the 3 frames"):
        first_anchors(GRID, 6, generator(), forced)


def test_fewer_anchors_than_frames_are_refused() -> None:
    with pytest.raises(ValueError, match=r"count must be in 3\.\.144 on a 3x8x6 grid, got 2"):
        first_anchors(GRID, 2, generator())
    with pytest.raises(ValueError, match="make_lift_plan: anchors must hold at least one token of every frame"):
        make_lift_plan(torch.tensor([[0, 50, 60, 70]]), GRID)


def test_frames_are_lifted_and_measured_as_pictures() -> None:
    anchors = first_anchors(GRID[1:], 20, generator())
    stacked = torch.cat([anchors + SIZE * frame for frame in range(3)])[None]
    values, velocity = torch.randn(1, 60, 3, generator=generator(1)), noise(seed=2)
    apart = make_lift_plan(anchors.expand(3, -1), GRID[1:])
    together = lift(values, make_lift_plan(stacked, GRID)).view(3, SIZE, 3)
    torch.testing.assert_close(together, lift(values[0].view(3, 20, 3), apart))
    scores = importance(velocity, GRID).view(3, SIZE)
    torch.testing.assert_close(scores, importance(velocity[0].view(3, SIZE, 3), GRID[1:]))


@pytest.mark.parametrize("lifter", ["velocity", "clean"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_run_of_a_stack_is_that_of_its_frames_alone(solver: str, lifter: str) -> None:
    config = TWO.replace(solver=solver, lifter=lifter)
    rows = torch.stack([first_anchors(GRID[1:], 19, generator(frame)) for frame in range(3)])
    stacked = (rows + SIZE * torch.arange(3)[:, None]).flatten()[None]
    state, fresh = noise(), noise(seed=1)
    together, seen = drive(config, GRID, state, stacked, fresh)
    alone, _ = drive(config, GRID[1:], state[0].view(3, SIZE, 3), rows, fresh[0].view(3, SIZE, 3))
    assert [anchors.shape[1] for anchors in seen] == [57, 57, 57, 144, 144, 144]
    torch.testing.assert_close(together[0].view(3, SIZE, 3), alone, rtol=1e-5, atol=1e-5)


def test_still_copies_in_each_frame_stay_copies() -> None:
    picture, fresh = noise(tokens=SIZE), noise(seed=1, tokens=SIZE)
    anchors = first_anchors(GRID[1:], 19, generator())
    stacked = torch.cat([anchors + SIZE * frame for frame in range(3)])[None]
    last, _ = drive(TWO, GRID, picture.repeat(1, 3, 1), stacked, fresh.repeat(1, 3, 1))
    frames = last.view(3, SIZE, 3)
    assert torch.equal(frames[0], frames[1]) and torch.equal(frames[0], frames[2])
    torch.testing.assert_close(frames[:1], drive(TWO, GRID[1:], picture, anchors[None], fresh)[0], rtol=1e-5, atol=1e-5)


def test_generation_of_frames_runs_all_its_stages_and_keeps_anchors_in_each() -> None:
    last, seen = drive(THREE, GRID, noise(2))
    counts = THREE.token_counts(NUM_TOKENS)
    assert last.isfinite().all()
    assert [anchors.shape[1] for anchors in seen] == [counts[THREE.stage_of_step(i, 11)] for i in range(11)]
    assert all(set((row // SIZE).tolist()) == {0, 1, 2} for anchors in seen for row in anchors)


def test_activation_ranks_all_frames_together() -> None:
    clock = KnownLevels(THREE, noise_levels(THREE))
    state = noise()
    run = Run(THREE, GRID, clock.step(0), state)
    first, end = run.anchors, THREE.stage_ends(clock.num_steps)[0]
    busy = torch.zeros(1, NUM_TOKENS, 3)
    busy[:, 2 * SIZE :] = 9.0 * noise(seed=5, tokens=SIZE)
    for index in range(end):
        run.leave(clock.step(index), state, gather_tokens(busy, run.anchors))
    run.enter(clock.step(end), state)
    new = run.anchors[0][~torch.isin(run.anchors[0], first[0])]
    assert int((new // SIZE == 2).sum()) == min(len(new), SIZE - int((first // SIZE == 2).sum()))


def test_statistics_and_plans_take_frames() -> None:
    device = torch.device("cpu")
    recorder = Recorder(cost=lambda n, text: n + text, batch=1, grid=GRID, text_tokens=8, device=device)
    with recorder.network(KnownLevels(TWO, noise_levels(TWO)).step(0), torch.arange(60)[None]):
        pass
    stats = summarize(
        recorder,
        codebase="c",
        execution="indexed",
        attention=None,
        compiled=None,
        notes=(),
        config=TWO,
        generations=1,
    )
    assert stats.grid == GRID and "grid 3x8x6" in str(stats) and stats.dense_step_flops == NUM_TOKENS + 8
    plan = manifest_tensors(TWO, noise_levels(TWO), GRID)
    assert plan["grid"].tolist() == [3, 8, 6] and plan["tokens"].tolist() == [57, 144]


def test_picture_of_active_tokens_refuses_frames() -> None:
    with pytest.raises(ValueError, match=r"show_active: grid must be .*got \(3, 8, 6\); show one frame"):
        show_active(np.zeros((16, 12, 3), np.uint8), [0], GRID)
