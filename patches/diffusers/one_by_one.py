"""`generate_batch` for pipelines whose requests cannot share forwards: each request is one pipeline call."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from jitaccel.errors import ConfigError, suggestion
from jitaccel.execution.options import Execution
from jitaccel.generation import registry
from jitaccel.generation.batch import OnBatchStep, OnOutcome, Outcome, OutputType, Request
from jitaccel.generation.handle import Handle, Installation
from jitaccel.method.config import JiTConfig

from ..foreign import Arguments, Pipeline
from .asked import call_parameters
from .hook import hook_of
from .outcomes import Outcomes, attempt
from .sound import sound_of

Asked = Mapping[int, tuple[Request, JiTConfig]]
"""Requests with their configurations, by their index in the batch."""
_FIELDS = ("prompt", "height", "width", "negative_prompt", "true_cfg_scale", "guidance_scale", "max_sequence_length")
_OURS = {  # arguments of a call that are not allowed as options, and what to use instead
    "generator": "seed=",
    "num_inference_steps": "steps=",
    "sigmas": "preset=JiTConfig(schedule=...)",
    "timesteps": "preset=JiTConfig(schedule=...)",
    "output_type": "output_type= of generate_batch",
    "return_dict": "Outcome.image",
    "callback_on_step_end": "on_step=",
    "num_images_per_prompt": "one request for each picture",
    "num_videos_per_prompt": "one request for each video",
    **{name: f"{name}=" for name in _FIELDS},
}


def generate_batch(
    pipeline: Pipeline,
    requests: Sequence[tuple[Request, JiTConfig]],
    how: Execution,
    output_type: OutputType,
    on_step: OnBatchStep | None = None,
    on_outcome: OnOutcome | None = None,
) -> list[Outcome]:
    """Returns the outcome of each request; see `jitaccel.generate_batch`."""
    outcomes = Outcomes(on_outcome)
    one_by_one(pipeline, dict(enumerate(requests)), how, output_type, outcomes, on_step)
    return [outcomes[index] for index in range(len(requests))]


def one_by_one(
    pipeline: Pipeline,
    requests: Asked,
    how: Execution,
    output_type: OutputType,
    outcomes: Outcomes,
    on_step: OnBatchStep | None,
) -> None:
    """Runs the requests and stores the outcome of each.

    Raises:
        ConfigError: If a request has a field or option that the pipeline's call does not take. All such requests are
            listed, before any is run.
        UnsupportedModelError: If the pipeline cannot be accelerated correctly.
    """
    check_unpatched(pipeline)
    check_arguments(pipeline, requests)
    for config in dict.fromkeys(config for _, config in requests.values()):
        _prepared(pipeline, config, how)  # raises before any request is run
    for index, (request, config) in requests.items():
        make = functools.partial(_outcome, pipeline, index, request, config, how, output_type, on_step)
        outcome = attempt(outcomes, index, request, make)
        if outcome is not None:
            outcomes[index] = outcome


def check_unpatched(pipeline: Pipeline) -> None:
    """Raises ConfigError if the pipeline is patched, because each request sets its own preset."""
    networks = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    if any(network is not None and hook_of(network) is not None for network in networks):
        raise ConfigError(
            "generate_batch: target must not be patched, got a pipeline with a patched transformer; "
            "remove() its handle first, because each request sets its own preset"
        )


def check_arguments(pipeline: Pipeline, requests: Asked) -> None:
    """Raises ConfigError, listing every field and option of a request that a pipeline's call does not take."""
    known = call_parameters(pipeline)
    options = [name for name in known if name not in ("self", *_OURS)]
    problems = []
    for index, (request, _) in requests.items():
        where = f"generate_batch: requests[{index}]:"
        for name in request.options:
            if name in _OURS:
                problems.append(f"{where} options must not have {name!r}; use {_OURS[name]}")
            elif name not in options:
                problems.append(
                    f"{where} options must be arguments of {type(pipeline).__name__}, got {name!r}; "
                    f"{suggestion(name, options, 'its call does not take it')}"
                )
        for name in ("negative_prompt", "true_cfg_scale", "guidance_scale", "max_sequence_length"):
            if getattr(request, name) is not None and name not in known:
                problems.append(
                    f"{where} {name} must be left out for {type(pipeline).__name__}, whose calls have none, got "
                    f"{getattr(request, name)!r}"
                )
    if problems:
        raise ConfigError("\n".join(problems))


def default_of(pipeline: Pipeline, name: str) -> Any:
    """Returns the default of an argument of a pipeline's call."""
    return call_parameters(pipeline)[name].default


def _prepared(pipeline: Pipeline, config: JiTConfig, how: Execution) -> Installation:
    from .. import find

    return find(pipeline).prepare(pipeline, config, None, how)


@contextmanager
def _patched(pipeline: Pipeline, config: JiTConfig, how: Execution) -> Iterator[Handle]:
    handle = Handle(pipeline, _prepared(pipeline, config, how))
    registry.put_in_place(handle)
    with handle:
        yield handle


def _outcome(
    pipeline: Pipeline,
    index: int,
    request: Request,
    config: JiTConfig,
    how: Execution,
    output_type: OutputType,
    on_step: OnBatchStep | None,
) -> Outcome:
    with _patched(pipeline, config, how) as handle:
        made = pipeline(**_call(pipeline, index, request, config, output_type, on_step))
        return Outcome(request, None, handle.stats().token_steps, made[0][0], sound_of(pipeline, made))


def _call(
    pipeline: Pipeline,
    index: int,
    request: Request,
    config: JiTConfig,
    output_type: OutputType,
    on_step: OnBatchStep | None,
) -> Arguments:
    """Returns the arguments of the pipeline's call."""
    known = call_parameters(pipeline)
    given = {name: getattr(request, name) for name in _FIELDS}
    call: dict[str, Any] = {name: value for name, value in given.items() if name in known and value is not None}
    call |= {"output_type": output_type, **request.options}
    call["generator"] = torch.Generator("cpu").manual_seed(request.seed)
    if config.steps != "caller":
        call["num_inference_steps"] = config.steps
    if on_step is not None and "callback_on_step_end" in known:

        def tell(pipe: Any, step: int, _: object, tensors: Any) -> Any:
            on_step(index, step + 1, pipe.num_timesteps)
            return tensors

        call["callback_on_step_end"] = tell
    return call
