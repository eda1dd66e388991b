"""Generates pictures from a checkpoint, without a pipeline: `python -m training.preview RUN PHASE OUT.png`."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from jitaccel.evaluation.scenes.captions import Claims
from jitaccel.evaluation.scenes.judge import Judge, Score, compare
from jitaccel.evaluation.scenes.prompts import held_out

from .muon import has_native_bfloat16
from .patch_encoder import latent_statistics
from .text import LENGTHS
from .transformer import CHANNELS, TextEncoders, token_ids

_CAPTION_PX = 26
_TOKENS_AT_ONCE = 4096


@torch.no_grad()
def sample(
    model: FluxTransformer2DModel,
    text: TextEncoders,
    prompts: Sequence[str],
    *,
    rows: int,
    columns: int,
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """Returns tokens `(B, rows * columns, CHANNELS)` after Euler steps on the scheduler's levels.

    `guidance` is the scale of classifier-free guidance, 1 for a model with built-in guidance.
    """
    count = len(prompts)
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(count, rows * columns, CHANNELS, generator=generator)
    levels = torch.linspace(1, 1 / steps, steps)
    ratio = np.exp(0.5 + (rows * columns - 256) * 0.65 / 3840)
    levels = torch.cat([ratio * levels / (1 + (ratio - 1) * levels), torch.zeros(1)])
    said, plain = text.embed(list(prompts), LENGTHS[0]), text.embed([""] * count, LENGTHS[0])
    ids = token_ids(rows, columns)
    for level, following in itertools.pairwise(levels):
        velocity = _velocity(model, state, level, said, ids)
        if guidance != 1:
            without = _velocity(model, state, level, plain, ids)
            velocity = without + guidance * (velocity - without)
        state = state + (following - level) * velocity
    return state


def _velocity(
    model: FluxTransformer2DModel, state: Tensor, level: Tensor, text: tuple[Tensor, Tensor], ids: Tensor
) -> Tensor:
    words, pooled = text
    with torch.autocast("cpu", torch.bfloat16, enabled=has_native_bfloat16()):
        velocity: Tensor = model(
            hidden_states=state,
            encoder_hidden_states=words,
            pooled_projections=pooled,
            timestep=level.expand(len(state)),
            img_ids=ids,
            txt_ids=torch.zeros(words.shape[1], 3),
            return_dict=False,
        )[0]
    return velocity.float()


@torch.no_grad()
def decoded(vae: AutoencoderKL, tokens: Tensor, rows: int, columns: int) -> NDArray[np.uint8]:
    """Returns pictures `(B, h, w, 3)` of packed tokens."""
    shift, scale = latent_statistics()
    cells = tokens.view(len(tokens), rows, columns, CHANNELS // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    latents = cells.reshape(len(tokens), CHANNELS // 4, 2 * rows, 2 * columns) / scale + shift
    pictures = torch.cat([vae.decode(part).sample for part in latents.split(4)])
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def sheet(pictures: NDArray[np.uint8], captions: Sequence[str], across: int) -> Image.Image:
    """Returns a sheet of the pictures with captions below them, `across` in each row."""
    height, width = pictures.shape[1:3]
    down = -(-len(pictures) // across)
    page = Image.new("RGB", (across * (width + 4), down * (height + _CAPTION_PX)), "white")
    pen = ImageDraw.Draw(page)
    letters = max(16, width // 6)
    for k, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = k % across * (width + 4), k // across * (height + _CAPTION_PX)
        page.paste(Image.fromarray(picture), (x, y))
        pen.text((x, y + height), caption[:letters] + "\n" + caption[letters : 2 * letters], fill="black")
    return page


def preview(
    run: Path, phase: str, prompts: Sequence[str], tokens: tuple[int, int], steps: int, guidance: float, seed: int
) -> NDArray[np.uint8]:
    """Returns pictures `(B, h, w, 3)` from the averaged weights of a phase, made in batches that fit into memory."""
    rows, columns = tokens
    model = FluxTransformer2DModel.from_pretrained(run / phase / "ema").eval()
    text = TextEncoders(run / "text")
    vae = AutoencoderKL.from_pretrained(run / "vae").eval()
    most = max(1, _TOKENS_AT_ONCE // (rows * columns))
    pictures = []
    for start in range(0, len(prompts), most):
        chosen = list(prompts[start : start + most])
        made = sample(
            model, text, chosen, rows=rows, columns=columns, steps=steps, guidance=guidance, seed=seed + start
        )
        pictures.append(decoded(vae, made, rows, columns))
    return np.concatenate(pictures)


def judged(judge: Judge, pictures: NDArray[np.uint8], claims: Sequence[Claims]) -> dict[str, object]:
    """Returns the share of claims that the judge sees, and the counts for each attribute."""
    score = sum((compare(seen, said) for seen, said in zip(judge(pictures), claims, strict=True)), Score())
    by_name = {name: [score.shown[name], score.claimed[name]] for name in score.claimed}
    return {"shown": round(score.accuracy, 4), "claimed": score.claimed.total(), "by attribute": by_name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("phase")
    parser.add_argument("out", type=Path, help="PNG to write; the judgement is written next to it as JSON")
    parser.add_argument("--tokens", default="16x16", help="height x width in tokens")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.5, help="1 for a model with built-in guidance")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows, columns = (int(side) for side in options.tokens.split("x"))
    texts, claims = zip(*held_out(options.count), strict=True)
    pictures = preview(
        options.run, options.phase, texts, (rows, columns), options.steps, options.guidance, options.seed
    )
    sheet(pictures, texts, across=min(8, max(1, 1200 // (columns * 8)))).save(options.out)
    if (options.run / "judge" / "judge.json").exists():
        found = judged(Judge.load(options.run / "judge"), pictures, claims)
        options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
