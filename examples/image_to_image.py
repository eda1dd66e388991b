"""Image to image with FLUX.1-dev: adds noise to a picture and denoises it with a prompt.

python examples/image_to_image.py --image sketch.png --prompt "a lighthouse at dawn, oil painting" --strength 0.8
"""

import argparse

import torch
from diffusers import FluxImg2ImgPipeline
from PIL import Image

import jitaccel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="folder or hub id")
parser.add_argument("--image", required=True, help="the picture to start from")
parser.add_argument("--prompt", default="a lighthouse at dawn, oil painting")
parser.add_argument("--preset", default="7x")
parser.add_argument("--strength", type=float, default=0.8, help="1.0 ignores the picture; lower values run fewer steps")
parser.add_argument("--size", type=int, default=1024, help="side in pixels")
parser.add_argument("--out", default="image_to_image.png")
arguments = parser.parse_args()

has_gpu = torch.cuda.is_available()
pipe = FluxImg2ImgPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16 if has_gpu else torch.float32)
if has_gpu:
    pipe.enable_model_cpu_offload()

# The stages are spread over the steps that really run, so they keep their shares at a strength below 1.
handle = jitaccel.apply(pipe, preset=arguments.preset)
image = pipe(
    arguments.prompt,
    image=Image.open(arguments.image).convert("RGB"),
    strength=arguments.strength,
    height=arguments.size,
    width=arguments.size,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save(arguments.out)
print(handle.stats())
