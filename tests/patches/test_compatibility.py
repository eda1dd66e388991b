"""Every cell of docs/compatibility.md: a pipeline, and a feature used together with acceleration."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import JiTConfig, UnsupportedModelError
from tests.support.compatibility import CODEBASES, COMPANY, Company, main
from tests.support.tiny import DENSE, NUM_TOKENS, relative_error

CELLS = [(name, codebase) for name, company in COMPANY.items() for codebase in company.only]
SPARSE = JiTConfig(densities=(0.5, 1.0), boundaries=(0.7, 1.0), steps=3)
"""Two steps, one: what is put beside a pipeline takes part in either stage and in the move between them."""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Compiled code of one cell must not serve the next; an attention backend is the process's in diffusers."""
    yield
    torch._dynamo.reset()
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def _generate(codebase: str, pipe: Any, company: Company = Company()) -> Tensor:  # noqa: B008 (frozen)
    call = {**CODEBASES[codebase].call, **company.call}
    latents: Tensor = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    return latents


@functools.cache
def _sparse_alone(codebase: str) -> Tensor:
    pipe = CODEBASES[codebase].make()
    with jitaccel.apply(pipe, SPARSE):
        return _generate(codebase, pipe)


def _sparse_tokens(codebase: str) -> list[int]:
    """The mask of the Fill pipeline's call has 20 tokens, which are active throughout."""
    masked = 20 if codebase == "Fill" else 0
    return [masked + (NUM_TOKENS - masked) // 2] * 2 + [NUM_TOKENS]


def _skip_without(name: str) -> None:
    for package in ("torchao", "bitsandbytes"):
        if name.startswith(package) and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make test lays it over the environment")


@pytest.mark.parametrize(("name", "codebase"), CELLS, ids=[f"{name}-{codebase}" for name, codebase in CELLS])
def test_cell(name: str, codebase: str) -> None:
    _skip_without(name)
    company = COMPANY[name]
    make = functools.partial(_generate, codebase, company=company)
    pipe = CODEBASES[codebase].make()
    if company.refused:
        company.put(pipe)
        with pytest.raises(UnsupportedModelError, match=company.refused):
            jitaccel.apply(pipe, SPARSE)
        return
    company.put(pipe)
    plain = make(pipe)
    with jitaccel.apply(pipe, DENSE):
        dense = make(pipe)
    assert torch.equal(dense, plain) if company.is_exact else relative_error(dense, plain) < 1e-5
    with jitaccel.apply(pipe, SPARSE) as handle:
        before = make(pipe)
        assert handle.stats().execution == company.outcome(codebase), handle.stats().notes
        assert [step.tokens for step in handle.stats().steps] == _sparse_tokens(codebase)
    assert torch.equal(make(pipe), plain) if company.is_exact else relative_error(make(pipe), plain) < 1e-5
    with jitaccel.apply(pipe, SPARSE, execution="indexed"):
        assert relative_error(make(pipe), before) < 1e-5
    is_alike = relative_error(before, _sparse_alone(codebase)) < 1e-5
    assert company.changes is None or is_alike is not company.changes
    _check_after(codebase, company, before)


def _check_after(codebase: str, company: Company, before: Tensor) -> None:
    """What is put there after `apply`, when a generation has run, makes the picture that it makes before."""
    pipe = CODEBASES[codebase].make()
    with jitaccel.apply(pipe, SPARSE) as handle:
        assert relative_error(_generate(codebase, pipe), _sparse_alone(codebase)) < 1e-5
        company.put(pipe)
        assert relative_error(_generate(codebase, pipe, company), before) < 1e-5
        assert handle.stats().execution == company.outcome(codebase, "after"), handle.stats().notes


@pytest.mark.parametrize("codebase", CODEBASES)
def test_interrupt_leaves_no_trace(codebase: str) -> None:
    pipe = CODEBASES[codebase].make()

    def interrupt(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 0
        return {}

    with jitaccel.apply(pipe, SPARSE) as handle:
        cut = _generate(codebase, pipe, Company(call={"callback_on_step_end": interrupt}))
        assert not torch.equal(cut, _sparse_alone(codebase)) and len(handle.stats().steps) == 1
        assert torch.equal(_generate(codebase, pipe), _sparse_alone(codebase))


def test_tiling_of_the_autoencoder_stays_and_its_picture_is_the_same() -> None:
    pipe = CODEBASES["FLUX.1"].make()
    COMPANY["VAE tiling and slicing"].put(pipe)
    pictures = []
    for config in (None, DENSE):
        call = Company(call={"output_type": "pt"})
        if config is None:
            pictures.append(_generate("FLUX.1", pipe, call))
        else:
            with jitaccel.apply(pipe, config):
                pictures.append(_generate("FLUX.1", pipe, call))
    assert torch.equal(*pictures) and pipe.vae.use_tiling


def test_table_is_up_to_date() -> None:
    assert main(["--check"]) == 0, "docs/compatibility.md is out of date: python -m tests.support.compatibility"
