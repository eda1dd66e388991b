"""Multistep schedulers on flow-matching levels: their levels are followed, and the step is the method's own.

UniPC (Wan's default) and DPM-Solver++ keep what the network said at earlier steps. UniPC rebuilds even the state from
that, so a move of newly activated tokens would be lost. With anything sparse, their levels stay (`flow_shift`
included) and jitaccel makes the step: Euler's, on the velocity that `JiTConfig.solver` corrects. With
`solver="caller"` the scheduler makes it, and forgets what it has kept of newly activated tokens (`begun_again`). A
dense configuration leaves the step to the scheduler, bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from jitaccel.generation.handle import MISSING, restore_attributes

from ..diffusers_private import count_step
from ..foreign import Forward, Scheduler
from .scheduler import check_scheduler

_KINDS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
STATE = ("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order")
"""What these schedulers keep from step to step, besides levels and place."""
_ROUNDING = 2e-6  # they lower a first level of 1 by 1e-6, against the logarithm of 0


def is_multistep(scheduler: Scheduler) -> bool:
    """Returns whether a scheduler is one of those that this module knows."""
    return any(kind.__name__ in _KINDS for kind in type(scheduler).__mro__)


def scheduler_problems(scheduler: Scheduler, solver: str, is_inverted: bool = False) -> list[str]:
    """Returns why a scheduler is neither first-order Euler nor a known multistep one on flow-matching levels.

    solver: of JiTConfig; "caller" asks more of the scheduler. is_inverted: whether levels have to rise, which Euler's
    scheduler alone can have.
    """
    if is_inverted:
        return check_scheduler(scheduler, is_inverted)
    if not is_multistep(scheduler):
        problems = check_scheduler(scheduler)
        is_other = bool(problems) and "must be a FlowMatch" in problems[0]
        return [f"{problems[0]}; {' and '.join(_KINDS)} with flow sigmas are known as well"] if is_other else problems
    config = scheduler.config
    wanted: dict[str, tuple[Any, ...]] = {
        "prediction_type": ("flow_prediction",),
        "use_flow_sigmas": (True,),
        "thresholding": (False,),
        "final_sigmas_type": ("zero",),
        "algorithm_type": ("dpmsolver++", "dpmsolver"),
        "solver_p": (None,),
    }
    if solver == "caller":
        wanted |= {"predict_x0": (True,), "solver_order": (1, 2)}  # a third order would reach across an activation
    return [
        f"its {type(scheduler).__name__} must have {name}={' or '.join(map(repr, allowed))}, got {config[name]!r}"
        for name, allowed in wanted.items()
        if name in config and config[name] not in allowed
    ]


def full_noise(levels: tuple[float, ...]) -> tuple[float, ...]:
    """Returns levels whose first is 1 where a multistep scheduler has lowered it, which only its own step needs."""
    return (1.0, *levels[1:]) if 1.0 - _ROUNDING < levels[0] < 1.0 else levels


def euler_step(scheduler: Scheduler, original: Forward, index: int, length: float) -> Callable[..., Any]:
    """Returns what takes the place of a scheduler's `step`: it moves the sample along a velocity, and counts the step.

    Args:
        scheduler: Whose count goes up.
        original: Its `step`, whose arguments and kind of result stay.
        index: The scheduler's index of this step.
        length: The next level minus this one.
    """

    def step(velocity: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(velocity, timestep, sample, *args, **kwargs)
        given.apply_defaults()
        after = (sample.float() + length * velocity.float()).to(sample.dtype)
        count_step(scheduler, index + 1)
        return SchedulerOutput(prev_sample=after) if given.arguments["return_dict"] else (after,)

    return step


@contextmanager
def begun_again(scheduler: Any, tokens: Tensor) -> Iterator[None]:
    """Lets one step of a multistep scheduler be the first one of some tokens; for others no bit changes.

    What it has kept of these tokens becomes what the network says of them now: no derivative is taken across their
    activation. UniPC rebuilds the state from the one before, `last_sample`, which becomes that from which its corrector
    arrives at the state given. DPM-Solver++ that begins in the middle does the same; UniPC that begins there would
    correct the step after with other weights.

    Args:
        scheduler: Whose `step` is called inside, once.
        tokens: Bool, of the shape of its sample or broadcast to it.
    """
    convert, before = scheduler.convert_model_output, vars(scheduler).get("convert_model_output", MISSING)

    def converted(model_output: Tensor, *args: Any, sample: Tensor, **kwargs: Any) -> Tensor:
        clean: Tensor = convert(model_output, *args, sample=sample, **kwargs)
        kept = scheduler.model_outputs
        scheduler.model_outputs = [None if each is None else torch.where(tokens, clean, each) for each in kept]
        if getattr(scheduler, "last_sample", None) is not None:
            level_before, level = scheduler.sigmas[scheduler.step_index - 1], scheduler.sigmas[scheduler.step_index]
            ratio = (level_before / level).to(sample.device)
            clean_part = ((1.0 - level) * ratio - (1.0 - level_before)).to(sample.device)
            start = (sample * ratio - clean_part * clean).to(scheduler.last_sample.dtype)
            scheduler.last_sample = torch.where(tokens, start, scheduler.last_sample)
        return clean

    scheduler.convert_model_output = converted
    try:
        yield
    finally:
        restore_attributes(vars(scheduler), {"convert_model_output": before})
