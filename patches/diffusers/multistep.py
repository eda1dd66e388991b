"""Multistep schedulers on flow-matching levels: jitaccel uses their levels but makes the step itself.

UniPC (Wan's default) and DPM-Solver++ store the network's outputs of earlier steps. UniPC even rebuilds the state from
them, so a move of newly activated tokens would be lost. In a sparse configuration, their levels stay (including
`flow_shift`), and jitaccel makes an Euler step along the velocity that `JiTConfig.solver` has corrected. With
`solver="caller"`, the scheduler makes the step, and what it stored for newly activated tokens is replaced
(`begun_again`). In a dense configuration, the scheduler makes the step, bit for bit.
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
"""Attributes that these schedulers carry from step to step, besides levels and step index."""
_ROUNDING = 2e-6  # these schedulers lower a first level of 1 by 1e-6, to avoid the logarithm of 0


def is_multistep(scheduler: Scheduler) -> bool:
    """Returns whether a scheduler is one of those that this module supports."""
    return any(kind.__name__ in _KINDS for kind in type(scheduler).__mro__)


def scheduler_problems(scheduler: Scheduler, solver: str, is_inverted: bool = False) -> list[str]:
    """Returns why a scheduler is neither first-order Euler nor a supported multistep one on flow-matching levels.

    Args:
        scheduler: The scheduler.
        solver: The solver of JiTConfig; "caller" has further requirements.
        is_inverted: Whether levels must rise, which only the Euler scheduler supports.
    """
    if is_inverted:
        return check_scheduler(scheduler, is_inverted)
    if not is_multistep(scheduler):
        problems = check_scheduler(scheduler)
        is_other = bool(problems) and "must be a FlowMatch" in problems[0]
        return [f"{problems[0]}; {' and '.join(_KINDS)} with flow sigmas work too"] if is_other else problems
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
        wanted |= {"predict_x0": (True,), "solver_order": (1, 2)}  # third order would span an activation
    return [
        f"its {type(scheduler).__name__} must have {name}={' or '.join(map(repr, allowed))}, got {config[name]!r}"
        for name, allowed in wanted.items()
        if name in config and config[name] not in allowed
    ]


def full_noise(levels: tuple[float, ...]) -> tuple[float, ...]:
    """Returns levels with the first restored to 1 if a multistep scheduler lowered it for its own step."""
    return (1.0, *levels[1:]) if 1.0 - _ROUNDING < levels[0] < 1.0 else levels


def euler_step(scheduler: Scheduler, original: Forward, index: int, length: float) -> Callable[..., Any]:
    """Returns a replacement for a scheduler's `step` that moves the sample along a velocity and counts the step.

    Args:
        scheduler: The scheduler whose step index is advanced.
        original: Its `step`, which determines the arguments and the type of the result.
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
    """Makes one step of a multistep scheduler the first step for some tokens; other tokens do not change by a bit.

    The outputs stored for these tokens are replaced by the network's current output, so that no derivative is taken
    across their activation. UniPC rebuilds the state from the previous one, `last_sample`; that is set so that its
    corrector arrives at the given state. A DPM-Solver++ started in the middle gives the same result. A UniPC started
    there would correct the following step with different weights.

    Args:
        scheduler: The scheduler, whose `step` is called once within this context.
        tokens: Bool, in the shape of its sample or broadcastable to it.
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
