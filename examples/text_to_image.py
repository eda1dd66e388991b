"""Text to image with FLUX.1-dev.

python examples/text_to_image.py --prompt "a lighthouse at dawn, oil painting"
"""

import argparse

import torch
from diffusers import FluxPipeline

import jitaccel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="folder or hub id")
parser.add_argument("--prompt", default="a lighthouse at dawn, oil painting")
parser.add_argument("--preset", default="7x")
parser.add_argument("--size", type=int, default=1024, help="side in pixels")
parser.add_argument("--out", default="text_to_image.png")
arguments = parser.parse_args()

has_gpu = torch.cuda.is_available()
pipe = FluxPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16 if has_gpu else torch.float32)
if has_gpu:
    pipe.enable_model_cpu_offload()  # with 40 GB of GPU memory or more, use pipe.to("cuda")

handle = jitaccel.apply(pipe, preset=arguments.preset)
image = pipe(
    arguments.prompt,
    height=arguments.size,
    width=arguments.size,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save(arguments.out)
print(handle.stats())  # tokens, operations and time of each step
