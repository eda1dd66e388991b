"""Compares examples/cpp on a device with Python: `python -m benchmarks.checkout.cpp_program --device cuda`.

A random FLUX of two blocks is exported to TorchScript, which needs no compiler on the device. The program is built with
the machine's make and g++. Exits with an error if the program's latents differ from Python's.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import jitaccel
from jitaccel import ops
from tests.support.benchmarks import TINY

from ..pipelines import random_call, random_pipeline

_GRID, _TEXT_TOKENS, _GUIDANCE = (16, 16), 8, 3.5
_MOST_ERROR = 1e-4  # relative to the largest value, in float32
_SOURCE = Path(__file__).resolve().parents[2] / "examples" / "cpp"


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds the program, runs both, and prints the difference of their latents."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkout.cpp_program", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="7x")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build(folder / "cpp")
        error = difference(program, folder, torch.device(options.device), options.preset)
    print(f"{options.preset} on {options.device}: the C++ program's latents are {error:.1e} from Python's")
    if not error < _MOST_ERROR:
        sys.exit(f"cpp_program: the error must be below {_MOST_ERROR}, got {error:.1e}")


def build(folder: Path) -> Path:
    """Builds the program in a separate folder and returns its path."""
    shutil.copytree(_SOURCE, folder, ignore=shutil.ignore_patterns("generate"))
    subprocess.run(["make", f"PYTHON={sys.executable}", "CXXFLAGS=-O0"], cwd=folder, check=True)
    return folder / "generate"


@torch.no_grad()
def difference(program: Path, folder: Path, device: torch.device, preset: str) -> float:
    """Returns the largest difference between the program's latents and Python's, relative to the largest value."""
    pipe = random_pipeline(TINY, device, torch.float32, seed=0)
    call = random_call(pipe, _GRID, 0, _TEXT_TOKENS)
    size = call["height"], call["width"]
    stages = jitaccel.export(pipe, folder / "stages", preset, size=size, format="torchscript", text_tokens=_TEXT_TOKENS)
    state = torch.randn(1, _GRID[0] * _GRID[1], TINY["in_channels"], generator=torch.Generator().manual_seed(0))
    with jitaccel.apply(pipe, preset):
        expected: Tensor = pipe(**call, latents=state.to(device), guidance_scale=_GUIDANCE).images
    given = {"state": state, "text": call["prompt_embeds"], "pooled": call["pooled_prompt_embeds"]}
    given["guidance"] = torch.tensor([_GUIDANCE])
    save_file({name: x.cpu().contiguous() for name, x in given.items()}, folder / "in.safetensors")
    libraries = [ops.compiled()[kind] for kind in ("cpu", "cuda") if kind in ops.compiled()]
    command = [program, stages, folder / "in.safetensors", folder / "out.safetensors", *libraries]
    subprocess.run([*map(str, command), *(["--device", "cuda"] if device.type == "cuda" else [])], check=True)
    made = load_file(folder / "out.safetensors")["state"]
    return float((made - expected.cpu()).abs().max() / expected.abs().max())


if __name__ == "__main__":
    main()
