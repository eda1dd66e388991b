"""Text to video with Wan 2.1 1.3B, in bfloat16 (autoencoder: float32), with one component on the GPU at a time.

python examples/video_wan.py --prompt "a lighthouse in a storm, waves"

Writing MP4 needs `pip install imageio imageio-ffmpeg`; an --out that ends in .gif needs nothing.
"""

import argparse

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_gif, export_to_video

import jitaccel

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="folder or hub id")
parser.add_argument("--prompt", default="a lighthouse in a storm, waves")
parser.add_argument("--preset", default="7x")
parser.add_argument("--height", type=int, default=480)
parser.add_argument("--width", type=int, default=832)
parser.add_argument("--frames", type=int, default=81, help="a multiple of 4, plus 1")
parser.add_argument("--out", default="video.mp4")
arguments = parser.parse_args()

has_gpu = torch.cuda.is_available()
vae = AutoencoderKLWan.from_pretrained(arguments.model, subfolder="vae", torch_dtype=torch.float32)
pipe = WanPipeline.from_pretrained(
    arguments.model, vae=vae, torch_dtype=torch.bfloat16 if has_gpu else torch.float32
)
if has_gpu:
    pipe.enable_model_cpu_offload()  # text encoder, transformer and autoencoder take turns on the GPU

handle = jitaccel.apply(pipe, preset=arguments.preset)  # keeps Wan's own noise levels
frames = pipe(
    arguments.prompt,
    height=arguments.height,
    width=arguments.width,
    num_frames=arguments.frames,
    generator=torch.Generator().manual_seed(0),
    output_type="pil",
).frames[0]
if arguments.out.endswith(".gif"):
    export_to_gif(frames, arguments.out)
else:
    export_to_video(frames, arguments.out, fps=16)
print(handle.stats())
