"""Exported stages refuse calls and machines that they were not made for."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import jitaccel
from jitaccel import ArtefactError, UnsupportedModelError
from jitaccel.artefacts.manifest import Manifest, manifest_tensors
from tests.support import tiny
from tests.support.exports import eager
from tests.support.tiny import TEXT_TOKENS, generate, relative_error


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"grid": (12, 14)}, "grid must be 12x12, .* got 12x14"),
        ({"grid": (9, 16)}, "grid must be 12x12, .* got 9x16"),
        ({"seed": (1, 2), "prompt": ["a", "red"]}, "batch must be 1, .* got 2"),
        ({"max_sequence_length": 7}, "text_tokens must be 8, .* got 7"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, "got joint_attention_kwargs too"),
    ],
)
def test_call_that_stages_were_not_made_for_is_refused(
    pipe: Any, exported: Path, call: dict[str, Any], words: str
) -> None:
    expected = eager(pipe)
    with jitaccel.load_exported(exported).apply(pipe):
        with pytest.raises((ArtefactError, UnsupportedModelError), match=words):
            generate(pipe, **call)
        assert relative_error(generate(pipe), expected) < 1e-5


def test_argument_of_a_stage_that_it_was_not_made_for_is_refused(exported: Path) -> None:
    """A compiled stage would read beyond the end of it."""
    loaded, manifest = jitaccel.load_exported(exported), Manifest.read(exported)
    blur = manifest_tensors(manifest.config, manifest.levels, manifest.grid)["blur_0"]
    anchors = torch.arange(manifest.tokens[0])[None]
    arguments = [
        tiny.start(), anchors, torch.zeros(1, 144, dtype=torch.int64), blur, torch.zeros(1, TEXT_TOKENS, tiny.WIDTH),
        torch.zeros(1, tiny.WIDTH), torch.ones(1), torch.tensor([0.9, 0.8]),
    ]  # fmt: skip
    velocity, state = loaded.run(0, *arguments)
    assert velocity.shape == state.shape == tiny.start().shape
    for place, name in enumerate(("state", "anchors", "nearest", "blur", "text", "pooled", "guidance", "levels")):
        for wrong in (arguments[place][..., :-1], arguments[place].to(torch.float16)):
            with pytest.raises(ArtefactError, match=rf"{name} must be torch\.\w+ .* got torch"):
                loaded.run(0, *arguments[:place], wrong, *arguments[place + 1 :])
    with pytest.raises(ArtefactError, match="got 7 of them"):
        loaded.run(0, *arguments[:-1])


def test_other_dtype_is_refused(pipe: Any, exported: Path) -> None:
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    with (
        jitaccel.load_exported(exported).apply(half),
        pytest.raises(ArtefactError, match=r"dtype must be float32, .* got bfloat16"),
    ):
        generate(half)


@pytest.mark.parametrize(
    ("made_for", "words"),
    [
        ({"torch_version": "2.9.0"}, r"torch_version must be 2\.9\.0, .* got " + torch.__version__.replace("+", r"\+")),
        ({"processor": "sparc"}, "processor must be sparc, .* got "),
        ({"device": "meta"}, "device must be meta, .* got cpu"),
    ],
)
def test_other_machine_is_refused(folder: Path, made_for: dict[str, str], words: str) -> None:
    replace(Manifest.read(folder), **made_for).write(folder)
    with pytest.raises(ArtefactError, match=words):
        jitaccel.load_exported(folder, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_device_that_is_not_here_is_refused(exported: Path) -> None:
    with pytest.raises(ArtefactError, match="no CUDA device"):
        jitaccel.load_exported(exported, device="cuda")
