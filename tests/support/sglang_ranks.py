"""Suites of `ranks` for SGLang's own FLUX.1 on ranks that divide the state."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from torch import Tensor, distributed

from tests.support import engines, sglang_native, tiny
from tests.support.sglang_network import SERVER

GROUP_S = 10.0  # the time-out of a group in which a rank raises but does not end
PAPER = {"preset": "7x-paper", "steps": 9}
ODD = {"text": 7}  # tokens of the prompt; if they cannot be divided, every rank has all of them
BRANCHES = {"enable_cfg_parallel": True}
CASES: Mapping[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "subset": (PAPER, {}, {}),
    "subset, second order": ({"preset": "few-steps"}, {}, {}),
    "subset, true CFG": (PAPER, {"scale": 2.0}, {}),
    "subset, batch of two": (PAPER, {"batch": 2}, {}),
    "subset, batch of two, true CFG, a prompt of seven": (PAPER, {"batch": 2, "scale": 2.0, **ODD}, {}),
    "pooled": ({"preset": "7x"}, {}, {}),
    "pooled, batch of two, true CFG": ({"preset": "7x"}, {"batch": 2, "scale": 2.0}, {}),
    "dense": ({"preset": "dense", "steps": 4}, {}, {}),
    "branches": (PAPER, {"scale": 2.0}, BRANCHES),
    "branches, pooled, batch of two": ({"preset": "7x"}, {"batch": 2, "scale": 2.0}, BRANCHES),
}
"""Cases by name: settings, request, and arguments of the server."""


@contextmanager
def _serving(settings: dict[str, Any], **server: Any) -> Iterator[Any]:
    """Yields the engine's stage with our hooks, which are removed afterwards."""
    from jitaccel.patches.serving.sglang import register

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITACCEL_CONFIG", json.dumps(settings))
        hooks = engines.install(patch).hooks
        register()
        hooks.apply_to(patch, sglang_native.DenoisingStage)
        yield sglang_native.served(tiny.pipeline(), **server)


def _requests(batch: int = 1, scale: float = 1.0, text: int = 8, **given: Any) -> tuple[Any, Any]:
    """Returns a request to the engine, and the same request for a diffusers pipeline."""
    asked, plain = sglang_native.request_of(batch, scale, **given), engines.request_of(batch, scale)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        shorter = getattr(plain, name)[:, :text]
        setattr(plain, name, shorter)
        setattr(asked, name, [None, shorter])
    return asked, plain


def pictures(rank: int) -> Any:
    """Runs every case divided among ranks and, with diffusers, in one process; returns the results by name."""
    from jitaccel.method.presets import resolve

    found = {}
    for name, (settings, request, server) in CASES.items():
        asked, plain = _requests(**request)
        ranks = 1 if server else distributed.get_world_size()
        with _serving(settings, **server) as stage:
            divided = sglang_native.made(stage, asked)
            others = {each: value for each, value in settings.items() if each != "preset"}
            config = resolve(settings["preset"], **others, multiple=ranks)
            found[name] = {
                "alone": engines.through_diffusers(plain, config),
                "divided": divided,
                "tokens": [each["tokens"] for each in stage.passed],
                "counts": config.stage_tokens(tiny.GRID),
                "parts": asked.parts,
                "ranks": ranks,
            }
    return found


def refusals(rank: int) -> Any:
    """Returns each rank's messages for requests that are refused or fail, by name, and pictures made afterwards."""
    from tests.support.ranks import error_of

    found: dict[str, Any] = {}

    def said(name: str, settings: dict[str, Any], server: Any = None, fails: bool = False, **given: Any) -> None:
        with _serving({"strict": True, **settings}, **(server or {})) as stage:
            request = sglang_native.request_of(**given)
            if fails:
                del request.rollout  # our hook reads it, the stand-in does not
            found[name] = error_of(lambda: sglang_native.made(stage, request))
            found[f"forwards, {name}"] = len(stage.passed)

    said("size", PAPER, grid=(11, 11))
    said("pooled size", {"preset": "7x"}, grid=(10, 10))
    said("settings", {**PAPER, "blur_scale": 0.4 + rank})
    said("one rank", PAPER, enable_spectrum=rank == 1)
    said("one rank fails", PAPER, fails=rank == 1)
    said("noise", PAPER, BRANCHES, scale=2.0, seed=rank)
    with _serving(PAPER) as stage:
        odd = sglang_native.request_of(grid=(11, 11))
        found["dense, odd size"] = sglang_native.made(stage, odd)
        found["forwards, dense"] = len(stage.passed)
        hook = stage.transformer.inner.x_embedder.register_forward_pre_hook(lambda _, args: (args[0] / 0,))
        found["not finite"] = error_of(lambda: sglang_native.made(stage, sglang_native.request_of()))
        hook.remove()
        found["picture"] = sglang_native.made(stage, sglang_native.request_of())
    return found


def _failing(rank: int, stage: Any) -> Tensor:
    """Makes a picture in which the third forward fails on the last rank."""
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3 and rank == distributed.get_world_size() - 1:
            raise ArithmeticError("the third forward fails here")

    stage.transformer.inner.x_embedder.register_forward_pre_hook(fail)
    return sglang_native.made(stage, sglang_native.request_of())


def fault(rank: int) -> Any:
    """The last rank raises within its third forward, and ends; the others must not wait for it."""
    with _serving(PAPER) as stage:
        _failing(rank, stage)


def survivor(rank: int) -> Any:
    """The last rank raises in its third forward but, like a server, does not end; the others wait for a time-out."""
    SERVER.group = distributed.new_group(timeout=timedelta(seconds=GROUP_S))
    begun = time.monotonic()
    try:
        with _serving(PAPER) as stage:
            _failing(rank, stage)
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - begun
    distributed.barrier()  # of another group
    return {"said": said, "seconds": seconds}


SUITES: Mapping[str, Callable[[int], Any]] = {
    "sglang": pictures,
    "sglang_refusals": refusals,
    "sglang_fault": fault,
    "sglang_survivor": survivor,
}
