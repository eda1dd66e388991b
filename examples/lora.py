"""Uses a LoRA with acceleration. Load it before or after `apply`, and change its scale at any time.

python examples/lora.py --lora my-lora.safetensors --prompt "a lighthouse in the style of the LoRA"
"""

import argparse

import torch
from diffusers import FluxPipeline

import jitaccel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="folder or hub id")
parser.add_argument("--lora", required=True, help="file, folder or hub id")
parser.add_argument("--scale", type=float, default=1.0)
parser.add_argument("--prompt", default="a lighthouse at dawn")
parser.add_argument("--preset", default="7x")
parser.add_argument("--size", type=int, default=1024, help="side in pixels")
parser.add_argument("--out", default="lora.png")
arguments = parser.parse_args()

has_gpu = torch.cuda.is_available()
pipe = FluxPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16 if has_gpu else torch.float32)
pipe.load_lora_weights(arguments.lora, adapter_name="mine")
pipe.set_adapters("mine", arguments.scale)
if has_gpu:
    pipe.enable_model_cpu_offload()

jitaccel.apply(pipe, preset=arguments.preset)
image = pipe(
    arguments.prompt,
    height=arguments.size,
    width=arguments.size,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save(arguments.out)
