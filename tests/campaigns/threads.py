"""Threads: pipelines that share weights can run in parallel; one pipeline in two threads is refused by name."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import torch

import jitaccel
from tests.campaigns.campaign import Counts, Survivor
from tests.campaigns.targets import CONFIGS
from tests.support import tiny
from tests.support.tiny import generate

_NAMED = ("one picture at a time", "making a picture in another thread")
_WAITS_S = 100


def case(rng: random.Random, counts: Counts) -> None:
    """Runs several threads with one pipeline each, or with one pipeline for all."""
    (_together if rng.random() < 0.5 else _rivals)(rng, counts)


def _in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    found: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(place: int) -> None:
        try:
            barrier.wait(_WAITS_S)
            found[place] = calls[place]()
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_WAITS_S)
        if thread.is_alive():
            raise Survivor("a thread hangs")
    return found


def _together(rng: random.Random, counts: Counts) -> None:
    shared = tiny.pipeline()
    pipes = [shared, *(tiny.beside(shared) for _ in range(rng.randint(1, 2)))]
    configs = [CONFIGS[rng.choice([*CONFIGS])] for _ in pipes]
    handles = [jitaccel.apply(pipe, config) for pipe, config in zip(pipes, configs, strict=True)]
    expected = [generate(pipe, seed) for seed, pipe in enumerate(pipes)]
    found = _in_threads([lambda seed=seed, pipe=pipe: generate(pipe, seed) for seed, pipe in enumerate(pipes)])  # type: ignore[misc]
    counts.operations += len(pipes)
    for seed, (picture, wanted) in enumerate(zip(found, expected, strict=True)):
        if not isinstance(picture, torch.Tensor) or not torch.equal(picture, wanted):
            raise Survivor(f"thread {seed} of {len(pipes)} on shared weights: {_said(picture)}")
    for handle in handles:
        handle.remove()


def _rivals(rng: random.Random, counts: Counts) -> None:
    pipe, config = tiny.pipeline(), CONFIGS[rng.choice([*CONFIGS])]
    plain = generate(pipe)
    jitaccel.apply(pipe, config)
    expected = generate(pipe)
    acts: list[Callable[[], Any]] = [lambda: generate(pipe), lambda: generate(pipe), lambda: jitaccel.remove(pipe)]
    step, act, found = rng.randrange(4), rng.choice(acts[1:]), []

    def callback(_: Any, at: int, *__: Any) -> dict[str, Any]:
        if at == step:
            found.extend(_in_threads([act]))
        return {}

    picture = generate(pipe, callback_on_step_end=callback)
    counts.operations += 2
    counts.faults += 1
    if not torch.equal(picture, expected):
        raise Survivor(f"a second thread at step {step} changes the picture")
    if not isinstance(found[0], RuntimeError) or not any(words in str(found[0]) for words in _NAMED):
        raise Survivor(f"a second thread at step {step}: {_said(found[0])}")
    if not torch.equal(generate(pipe), expected):
        raise Survivor("the picture after a second thread is wrong")
    jitaccel.remove(pipe)
    if not torch.equal(generate(pipe), plain):
        raise Survivor("the picture after removal is wrong")


def _said(found: Any) -> str:
    return f"{type(found).__name__}: {found}"[:300] if isinstance(found, BaseException) else "a wrong picture"
