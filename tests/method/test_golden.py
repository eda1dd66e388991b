"""Numbers of the released code on a tiny random FLUX, reproduced by the pure functions.

`steps[i]` is the state after Euler step i, before the move at the following boundary. The level of a move is that of
the next step.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from jitaccel.method.anchors import activate, first_anchors, merge_anchors
from jitaccel.method.config import JiTConfig
from jitaccel.method.importance import importance
from jitaccel.method.lift import lift, lift_velocity, make_lift_plan
from jitaccel.method.microflow import micro_flow
from jitaccel.method.presets import PRESETS
from jitaccel.method.schedule import noise_levels
from jitaccel.tokens import gather_tokens
from tests.support.golden import COPY, GOLDEN, SHARED, recorded_model

NAMES = ("4x_384x640", "4x_512x512", "7x_384x640", "7x_512x512")


@dataclass
class Trajectory:
    """A released run, and the result of the pure functions from the same start."""

    config: JiTConfig
    grid: tuple[int, int]
    tensors: dict[str, Tensor]
    levels: tuple[float, ...]
    result: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Tensor] = field(default_factory=list)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def _load(name: str) -> Trajectory:
    path = GOLDEN / f"trajectory_{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    released = json.loads(metadata["config"])
    config = JiTConfig(
        densities=released["sparsity_ratios"],
        boundaries=released["stage_ratios"],
        steps=released["total_steps"],
        alpha=released["alpha"],
        beta=released["beta"],
        relax_steps=released["microflow_relax_steps"],
    )
    assert config == PRESETS[f"{name[:2]}-paper"]
    assert list(config.stage_ends(released["total_steps"])) == released["stage_steps"]
    grid = (int(metadata["height_tokens"]), int(metadata["width_tokens"]))
    return Trajectory(config=config, grid=grid, tensors=load_file(path), levels=noise_levels(config))


def _velocity_at(model: Any, run: Trajectory, state: Tensor, anchors: Tensor, level: float) -> Tensor:
    rows, columns = anchors[0] // run.grid[1], anchors[0] % run.grid[1]
    velocity: Tensor = model(
        hidden_states=gather_tokens(state, anchors),
        encoder_hidden_states=run.tensors["prompt_embeds"],
        pooled_projections=run.tensors["pooled"],
        timestep=torch.tensor([level]),
        guidance=torch.tensor([3.5]),
        txt_ids=torch.zeros(run.tensors["prompt_embeds"].shape[1], 3),
        img_ids=torch.stack([torch.zeros_like(rows), rows, columns], dim=1).float(),
        return_dict=False,
    )[0]
    return velocity


def _replay(run: Trajectory, model: Any) -> None:
    config, grid, result = run.config, run.grid, run.result
    num_steps = len(run.levels) - 1
    counts = config.token_counts(grid[0] * grid[1])
    state, stage = run.tensors["initial"], 0
    previous, velocity = state, torch.full_like(state, torch.nan)  # until the first step has been taken
    plan = make_lift_plan(run.tensors["anchors0"][None], grid, config.blur_scale)
    for step in range(num_steps):
        level = run.levels[step]
        if config.stage_of_step(step, num_steps) > stage:
            stage += 1
            ranking = importance(velocity, grid, config.importance_window)
            tokens = activate(ranking, plan.anchors, counts[stage] - counts[stage - 1])
            boundary = (previous, velocity, run.tensors["fresh_noise"], tokens, plan, (run.levels[step - 1], level))
            target = micro_flow(state, *boundary, 1.0)
            state = micro_flow(state, *boundary, config.move_weight)
            plan = make_lift_plan(merge_anchors(plan.anchors, tokens), grid, config.blur_scale)
            result[f"importance{stage}"] = ranking[0].view(grid)
            result[f"activated{stage}"] = tokens[0]
            result[f"anchors{stage}"] = plan.anchors[0]
            result[f"target{stage}"] = gather_tokens(target, tokens)
            result[f"bridged{stage}"] = state
        values = _velocity_at(model, run, state, plan.anchors, level)
        velocity = lift_velocity(values, state, level, plan, config.lifter)
        previous, state = state, state + (run.levels[step + 1] - level) * velocity
        run.steps.append(state[0])
    result["final"] = state


@pytest.fixture(scope="module")
def model() -> Any:
    return recorded_model()


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest, model: Any) -> Trajectory:
    trajectory = _load(request.param)
    with torch.no_grad():
        _replay(trajectory, model)
    return trajectory


def test_golden_copy_equals_the_shared_files() -> None:
    if not SHARED.is_dir():
        pytest.skip("no shared/golden beside this checkout")
    names = sorted(path.name for path in SHARED.iterdir())
    assert sorted(path.name for path in COPY.iterdir()) == names
    for name in names:
        assert (COPY / name).read_bytes() == (SHARED / name).read_bytes(), name


@pytest.mark.parametrize("case", range(4))
def test_operators_match_the_released_code(case: int) -> None:
    tensors = load_file(GOLDEN / "operators.safetensors")
    grid_h, grid_w = tensors[f"{case}.grid"].tolist()
    values, anchors = (
        tensors[f"{case}.values"],
        tensors[f"{case}.anchors"].expand(len(tensors[f"{case}.values"]), -1),
    )
    lifted = lift(values, make_lift_plan(anchors.contiguous(), (grid_h, grid_w)))
    ranking = importance(tensors[f"{case}.lifted"], (grid_h, grid_w)).view(-1, grid_h, grid_w)
    assert _relative_error(lifted, tensors[f"{case}.lifted"]) < 1e-6
    assert _relative_error(ranking, tensors[f"{case}.importance"]) < 1e-6


def test_trajectory_levels_match(run: Trajectory) -> None:
    assert run.levels[:-1] == pytest.approx(run.tensors["sigmas"].tolist(), abs=1e-7)


def test_trajectory_first_anchors_are_nested_with_ours(run: Trajectory) -> None:
    released = run.tensors["anchors0"].tolist()
    height, width = run.grid
    border = [t for t in range(height * width) if t // width in (0, height - 1) or t % width in (0, width - 1)]
    inner = [t for t in range(height * width) if (t // width) % 2 == 0 and (t % width) % 2 == 0]
    regular = first_anchors(run.grid, len({*border, *inner})).tolist()
    assert len(released) == run.config.token_counts(height * width)[0]
    assert set(released) <= set(regular) or set(regular) <= set(released)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["activated", "anchors"])
def test_trajectory_activates_the_same_tokens(run: Trajectory, kind: str, stage: int) -> None:
    assert torch.equal(run.result[f"{kind}{stage}"], run.tensors[f"{kind}{stage}"])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["importance", "target", "bridged"])
def test_trajectory_boundaries_match(run: Trajectory, kind: str, stage: int) -> None:
    assert _relative_error(run.result[f"{kind}{stage}"], run.tensors[f"{kind}{stage}"]) < 1e-5


def test_trajectory_steps_and_final_match(run: Trajectory) -> None:
    expected = run.tensors["steps"]
    assert len(run.steps) == len(expected)
    for actual, released in zip(run.steps, expected, strict=True):
        assert _relative_error(actual, released) < 1e-5
    assert _relative_error(run.result["final"], run.tensors["final"]) < 1e-5


def test_trajectory_steps_exclude_the_move_of_the_boundary_that_follows(run: Trajectory) -> None:
    ends = run.config.stage_ends(len(run.steps))
    for stage in (1, 2):
        before = run.tensors["steps"][ends[stage - 1] - 1]
        moved = (run.tensors[f"bridged{stage}"][0] != before).any(dim=1).nonzero().squeeze(1)
        assert torch.equal(moved, run.tensors[f"activated{stage}"])
