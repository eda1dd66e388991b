"""Times a step of a cut model, with the first call that its pipeline makes of the transformer.

The call is not constructed here. The pipeline is called with an empty prompt and stopped when it calls the transformer,
so sizes, conditions and guidance branches are those of its own calls.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.execution.options import Execution
from jitaccel.execution.private import uncompiled
from jitaccel.limits import MOST_SIDE
from jitaccel.method.anchors import first_anchors
from jitaccel.method.run import Run
from jitaccel.speed.cost import Probe

from ..diffusers_private import quiet
from ..foreign import Arguments, Pipeline
from ..models import MODELS, model_of_pipeline
from ..models.calls import CutCalls
from ..ranks import ranks_multiple
from .asked import call_parameters
from .cut import check_pipeline, networks_of
from .guidance import guidance_problem, mixes_tokens
from .hook import hook_of, named_arguments
from .probe import SPARSE, STEP, offload, refuse_ranks


class _Reached(Exception):
    """Stops a pipeline when it calls a transformer, and holds that call."""

    def __init__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__("the transformer is reached")
        self.network, self.args_of_call, self.kwargs = network, args, kwargs


def probe_pipeline(
    pipeline: Pipeline, size: tuple[int, int] | None, text_tokens: int | None, execution: Execution, call: Arguments
) -> Probe:
    """Returns forwards of a pipeline's transformer, as the pipeline calls it.

    Args:
        pipeline: A pipeline of a cut model.
        size: (height, width) in pixels; None for the pipeline's default.
        text_tokens: Length of prompts, padding included; None for the pipeline's default.
        execution: How `apply` would run it; compilation is ignored.
        call: Further arguments of the pipeline's call.

    Raises:
        ConfigError: If the pipeline does not reach its transformer with these arguments.
        UnsupportedModelError: If the pipeline cannot be accelerated, or its number of steps is not known.
    """
    model = model_of_pipeline(pipeline)
    assert model is not None
    check_pipeline(pipeline, model, SPARSE)
    known = call_parameters(pipeline)
    if "strength" in known:
        raise UnsupportedModelError(
            f"auto_config: target must be a pipeline that starts from noise, got {type(pipeline).__name__}, which "
            f'skips some steps (strength); give a preset ("4x", "7x") instead'
        )
    if (problem := guidance_problem(pipeline)) is not None:
        raise UnsupportedModelError(f"auto_config: target must have guidance that is known, got {problem}")
    for network in networks_of(pipeline).values():
        refuse_ranks(network)
    reached = _first_call(pipeline, _arguments(pipeline, known, size, text_tokens, call))
    network, hook = reached.network, hook_of(reached.network)
    original = network if hook is None else hook.fn_ref.original_forward  # beneath the hook of an earlier apply
    names = tuple(each.name for each in MODELS)
    arguments = model.words.read(named_arguments(network, names, network.forward, reached.args_of_call, reached.kwargs))
    rows = arguments["hidden_states"].shape[0]
    calls = CutCalls(model, [network], dataclasses.replace(execution, compile=None))
    given = calls.given(network, arguments, rows if model.branches == "batch" else 1, mixes_tokens(pipeline))
    forced = model.forced(given.config, arguments)
    held = None if forced is None else forced[0].cpu()
    device = given.tokens.device

    def sparse(count: int) -> Callable[[], Tensor]:
        generator = torch.Generator("cpu").manual_seed(0)
        anchors = first_anchors(given.grid, count, generator, held).to(device).expand(len(given.tokens), -1)
        run = Run(SPARSE, given.grid, STEP, given.tokens, anchors=anchors, patch=given.layout.side)
        evaluate = calls.call(network, original, given).evaluate

        def step() -> Tensor:
            values = evaluate(run, given.tokens).values[: len(given.tokens)]
            return run.leave(STEP, given.tokens, values)

        return step

    def release() -> None:
        calls.remove()
        offload(pipeline)

    return Probe(
        num_tokens=given.num_tokens,
        text_tokens=model.num_text(arguments),
        device=device,
        dense=functools.partial(original, **model.words.write({**arguments, "return_dict": False})),
        sparse=sparse,
        multiple=ranks_multiple(uncompiled(network)),
        grid=given.grid,
        num_forced=0 if held is None else int(held.sum()),
        rows=rows,
        release=release,
    )


def _arguments(
    pipeline: Pipeline,
    known: Mapping[str, inspect.Parameter],
    size: tuple[int, int] | None,
    text_tokens: int | None,
    call: Arguments,
) -> dict[str, Any]:
    """Returns the arguments of the pipeline's call; raises ConfigError for arguments that it does not take."""
    given: dict[str, Any] = {} if any(name.startswith("prompt_embeds") for name in call) else {"prompt": ""}
    if size is not None:
        given |= zip(("height", "width"), _checked_size(size), strict=True)
    if text_tokens is not None:
        given["max_sequence_length"] = text_tokens
    given |= {"generator": torch.Generator("cpu").manual_seed(0), **call}
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(
            f"auto_config: the call of a {type(pipeline).__name__} must take the given arguments, got "
            f"{', '.join(unknown)}, which it does not take; leave it out"
        )
    return given


def _checked_size(size: Any) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or any(not isinstance(side, int) or not 1 <= side <= MOST_SIDE for side in sides):
        raise ConfigError(
            f"auto_config: size must be (height, width) in pixels, {MOST_SIDE} at most, got {size!r}; give two numbers"
        )
    return (sides[0], sides[1])


def _first_call(pipeline: Pipeline, arguments: Arguments) -> _Reached:
    """Returns a pipeline's first call of a transformer, without running it; the scheduler is not changed."""

    def stop(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(network, args, kwargs)

    scheduler, before = pipeline.scheduler, dict(vars(pipeline.scheduler))
    placed = [
        network.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        for network in networks_of(pipeline).values()
    ]
    kind = type(pipeline).__name__
    try:
        with quiet(pipeline):
            pipeline(**arguments)
    except _Reached as reached:
        return reached
    except (ConfigError, UnsupportedModelError):
        raise
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"auto_config: the call of a {kind} must reach its transformer, got {type(error).__name__}: {error}; pass "
            f"the arguments it needs: Auto(..., call={{...}}), or auto_config(..., call={{...}})"
        ) from error
    finally:
        for handle in placed:
            handle.remove()
        vars(scheduler).clear()
        vars(scheduler).update(before)
    raise ConfigError(f"auto_config: the call of a {kind} must reach its transformer, got none; give a preset instead")
