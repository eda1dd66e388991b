"""Inpainting with FLUX.1-dev: every token inside the mask is computed from the first step on.

python examples/inpainting.py --image room.png --mask mask.png --prompt "a cat on the sofa"

White areas of the mask are repainted. The preset computes a subset of the tokens (`7x-paper`), because a preset with
steps at half the size (`7x`) has no individual tokens that a mask could select.
"""

import argparse

import torch
from diffusers import FluxInpaintPipeline
from PIL import Image

import jitaccel

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="folder or hub id")
parser.add_argument("--image", required=True)
parser.add_argument("--mask", required=True, help="picture of the same size; white areas are repainted")
parser.add_argument("--prompt", default="a cat on the sofa")
parser.add_argument("--preset", default="7x-paper")
parser.add_argument("--size", type=int, default=1024, help="side in pixels")
parser.add_argument("--out", default="inpainting.png")
arguments = parser.parse_args()

has_gpu = torch.cuda.is_available()
pipe = FluxInpaintPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16 if has_gpu else torch.float32)
if has_gpu:
    pipe.enable_model_cpu_offload()

handle = jitaccel.apply(pipe, preset=arguments.preset)
image = pipe(
    arguments.prompt,
    image=Image.open(arguments.image).convert("RGB"),
    mask_image=Image.open(arguments.mask).convert("L"),
    strength=0.9,
    height=arguments.size,
    width=arguments.size,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save(arguments.out)

for stage, anchors in enumerate(handle.stats().anchors):  # (B, M): raster indices of the computed tokens
    print(f"stage {stage}: {anchors.shape[1]} tokens computed")
