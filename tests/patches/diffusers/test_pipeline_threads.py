"""Threads: sharing works where allowed; other sharing is refused by name, and the running picture stays correct."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from tests.support import tiny
from tests.support.tiny import SHORT, generate


def in_thread(call: Callable[[], Any]) -> list[Any]:
    """Returns the result or error of a call in a thread."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert outcome, "the thread hangs"
    return outcome


def meanwhile(pipe: Any, call: Callable[[], Any], step: int = 1) -> tuple[Tensor, Any]:
    """Returns a picture, and the outcome of a call in another thread after one of its steps."""
    outcome: list[Any] = []

    def callback(_: Any, at: int, *__: Any) -> dict[str, Any]:
        if at == step:
            outcome.extend(in_thread(call))
        return {}

    return generate(pipe, callback_on_step_end=callback), outcome[0]


@pytest.mark.parametrize("step", [0, 1, 3])
def test_removal_from_another_thread_is_refused_while_a_picture_is_made(pipe: Any, step: int) -> None:
    plain = generate(pipe, num_inference_steps=4)
    handle = jitaccel.apply(pipe, SHORT)
    sparse = generate(pipe)
    for act in (handle.remove, lambda: jitaccel.remove(pipe), lambda: jitaccel.apply(pipe, "dense")):
        picture, error = meanwhile(pipe, act, step)
        assert torch.equal(picture, sparse)
        assert isinstance(error, RuntimeError) and "making a picture in another thread" in str(error)
        assert handle.is_active and jitaccel.handle_of(pipe) is handle and torch.equal(generate(pipe), sparse)
    in_thread(handle.remove)  # nothing is under way
    assert not handle.is_active and torch.equal(generate(pipe, num_inference_steps=4), plain)


def test_second_thread_on_one_pipeline_is_refused_and_the_first_goes_on(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
        picture, error = meanwhile(pipe, lambda: generate(pipe, 1))
        assert torch.equal(picture, sparse)
        assert isinstance(error, RuntimeError) and "one picture at a time" in str(error) and "a lock" in str(error)
        assert torch.equal(generate(pipe), sparse)


def test_thread_that_failed_leaves_the_pipeline_to_others(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)

        def fails() -> None:
            generate(pipe, callback_on_step_end=lambda *_: 1 / 0)

        assert isinstance(in_thread(fails)[0], ZeroDivisionError)
        assert torch.equal(generate(pipe), sparse)


def test_pipelines_that_share_weights_make_their_pictures_in_threads(pipe: Any) -> None:
    others = [pipe, *(tiny.beside(pipe) for _ in range(2))]
    handles = [jitaccel.apply(each, SHORT) for each in others]
    expected = [generate(each, seed) for seed, each in enumerate(others)]
    found: dict[int, Any] = {}
    barrier = threading.Barrier(len(others))

    def run(seed: int) -> None:
        barrier.wait(60)
        try:
            found[seed] = [generate(others[seed], seed) for _ in range(3)]
        except BaseException as error:
            found[seed] = error

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(len(others))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for seed, picture in enumerate(expected):
        assert isinstance(found[seed], list), found[seed]
        assert all(torch.equal(each, picture) for each in found[seed])
    for handle in handles:
        handle.remove()
