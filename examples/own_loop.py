"""Accelerates a bare transformer in your own Euler loop, which needs no changes.

python examples/own_loop.py --prompt "a lighthouse at dawn, oil painting"
"""

import argparse
from itertools import pairwise

import torch
from diffusers import FluxPipeline

import jitaccel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="folder or hub id")
parser.add_argument("--prompt", default="a lighthouse at dawn, oil painting")
parser.add_argument("--preset", default="7x")
parser.add_argument("--size", type=int, default=1024, help="side in pixels")
parser.add_argument("--out", default="own_loop.png")
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = FluxPipeline.from_pretrained(arguments.model, torch_dtype=dtype).to(device)  # used for its components only
prompt, pooled, text_ids = pipe.encode_prompt(arguments.prompt, None)
state, image_ids = pipe.prepare_latents(
    1,
    pipe.transformer.config.in_channels // 4,
    arguments.size,
    arguments.size,
    dtype,
    device,
    torch.Generator().manual_seed(0),
)
guidance = torch.full([1], 3.5, device=device)

levels = jitaccel.noise_levels(jitaccel.PRESETS[arguments.preset])  # sigmas from 1.0 down to 0.0
with torch.no_grad(), jitaccel.apply(pipe.transformer, arguments.preset, noise_levels=levels):
    for level, next_level in pairwise(levels):
        velocity = pipe.transformer(
            hidden_states=state,
            timestep=torch.full([1], level, dtype=dtype, device=device),
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=prompt,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        state = state + (next_level - level) * velocity

    latents = pipe._unpack_latents(state, arguments.size, arguments.size, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pictures = pipe.vae.decode(latents.to(dtype), return_dict=False)[0]
pipe.image_processor.postprocess(pictures)[0].save(arguments.out)
