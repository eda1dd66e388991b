"""The C++ program that runs exported stages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jitaccel import ops
from jitaccel.artefacts.manifest import write_tensors
from tests.support import tiny
from tests.support.exports import TWO_STAGES, eager, export
from tests.support.tiny import SHORT, TEXT_TOKENS, relative_error


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`examples/cpp`, built as its README says, in a folder with a space in its name."""
    if shutil.which("g++") is None or shutil.which("make") is None:
        pytest.skip("no C++ compiler")
    if "cpu" not in ops.compiled():
        pytest.skip("the CPU operators are not built")
    source = Path(__file__).parents[2] / "examples" / "cpp"
    folder = tmp_path_factory.mktemp("an example") / "cpp"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("generate"))
    done = subprocess.run(
        ["make", f"PYTHON={sys.executable}", "CXXFLAGS=-O0"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return folder / "generate"


def _run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(argument) for argument in (program, *arguments, ops.compiled()["cpu"])]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _inputs(pipe: Any, path: Path, seeds: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Writes the program's inputs, and returns the arguments of the pipeline's call."""
    text, pooled, _ = pipe.encode_prompt(
        "a red circle", None, num_images_per_prompt=len(seeds), max_sequence_length=TEXT_TOKENS
    )
    state = torch.cat([tiny.start(seed) for seed in seeds])
    write_tensors(path, {"state": state, "text": text, "pooled": pooled, "guidance": torch.full((len(seeds),), 3.5)})
    return {"latents": state}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchscript", "aoti"])
def test_cpp_program_makes_the_same_latents(
    pipe: Any, program: Path, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, config = {"torchscript": ("exported", SHORT), "aoti": ("aoti", TWO_STAGES)}[kind]
    call = _inputs(pipe, tmp_path / "in.safetensors", (5,))
    done = _run(program, request.getfixturevalue(folder), tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    made = load_file(tmp_path / "out.safetensors")["state"]
    assert relative_error(made, eager(pipe, config, guidance_scale=3.5, **call)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"densities": (0.2, 0.7, 1.0), "noise": "own"},
        {"densities": (0.6, 0.8, 1.0)},
        {"lifter": "clean", "micro_flow": "none"},
        {"solver": "dpmpp_2m"},
        {"densities": (0.25, 0.7, 1.0), "pooling": (2, 1, 1), "solver": "dpmpp_2m", "lifter": "clean"},
    ],
    ids=["own noise", "fresh noise", "clean, none", "multistep", "pooled"],
)
def test_cpp_program_makes_a_batch_with_few_and_many_anchors(
    pipe: Any, program: Path, settings: Mapping[str, Any], tmp_path: Path
) -> None:
    """Fewer anchors than the regular ones, and more: both are drawn at random, and then the noise."""
    config = SHORT.replace(**settings)
    folder = export(pipe, tmp_path / "x", config, batch_size=2)
    call = _inputs(pipe, tmp_path / "in.safetensors", (5, 6))
    done = _run(program, folder, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    expected = eager(pipe, config, num_images_per_prompt=2, guidance_scale=3.5, **call)
    assert relative_error(load_file(tmp_path / "out.safetensors")["state"], expected) < 1e-5


@pytest.mark.slow
def test_cpp_program_says_what_is_wrong_in_one_line(pipe: Any, program: Path, folder: Path, tmp_path: Path) -> None:
    inputs, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    _inputs(pipe, inputs, (5,))
    whole = inputs.read_bytes()
    for content, words in (
        (whole[:-4], "must lie within the file"),
        (whole[:20], "fewer than its header says"),
        (b"", "got 0 bytes"),
        (len(b"[1]").to_bytes(8, "little") + b"[1]", "expected {"),
        (whole.replace(b'"pooled"', b'"poolex"'), "must hold a tensor pooled, got none"),
        (whole.replace(b'"F32"', b'"F12"'), "got F12"),
    ):
        inputs.write_bytes(content)
        done = _run(program, folder, inputs, out)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    inputs.write_bytes(whole)
    (folder / "stage1.pt").unlink()
    done = _run(program, folder, inputs, out)
    assert done.returncode == 2 and "must hold stage1.pt2 or .pt, got neither" in done.stderr
    assert _run(program, folder).returncode == 2 and not out.exists()
