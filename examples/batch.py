"""Runs requests with different sizes, prompts and presets in shared forward passes, as a server would.

python examples/batch.py --out-folder out
"""

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline

import jitaccel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="folder or hub id")
parser.add_argument("--size", type=int, default=1024, help="side of the largest picture in pixels")
parser.add_argument("--out-folder", type=Path, default=Path("out"))
arguments = parser.parse_args()

has_gpu = torch.cuda.is_available()
pipe = FluxPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16 if has_gpu else torch.float32)
if has_gpu:
    pipe.to("cuda")

side, half = arguments.size, arguments.size // 2
requests = [
    jitaccel.Request(prompt="green mountains at noon with the sea", height=side, width=side, seed=1),
    jitaccel.Request(prompt="snowy mountains at night, stars", height=half, width=side, seed=2, preset="4x"),
    jitaccel.Request(prompt="a desert at dusk", height=half, width=half, seed=3, preset="7x-paper"),
]
arguments.out_folder.mkdir(parents=True, exist_ok=True)
for index, outcome in enumerate(jitaccel.generate_batch(pipe, requests)):  # leaves the pipeline unpatched
    outcome.image.save(arguments.out_folder / f"{index}.png")  # raises if this request failed
