"""Trains the judge on slightly degraded drawn landscapes, and measures it on combinations it has not seen.

Generated pictures suffer from blur, noise, wrong brightness and losses of the autoencoder. The training pictures have
some of each, so that the judge reacts to attributes and not to sharpness.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from jitaccel.evaluation.scenes.canvas import REGIONS
from jitaccel.evaluation.scenes.draw import draw
from jitaccel.evaluation.scenes.judge import (
    CELL_VALUES,
    PICTURE_PX,
    REGIONS_OF,
    Judge,
    JudgeNetwork,
    split_by_attribute,
)
from jitaccel.evaluation.scenes.prompts import held_out_landscape
from jitaccel.evaluation.scenes.scene import ATTRIBUTES, Landscape

from .log import TrainingLog, warmup_cosine
from .muon import has_native_bfloat16
from .patch_encoder import PATCH, patch_features
from .pictures import TOKEN_PX, PictureSet

BATCH = 32
NUM_DRAWN = 512  # number of held-out drawings whose features are saved with the judge
_STREAM = 0x6A756467  # "judg"
_CELL_SHARE = 0.05  # the mean share of cells at which a value has weight 1; rarer values have more


def train_judge(run: Path, updates: int, seed: int = 7, num_held_out: int = 500, num_drawn: int = NUM_DRAWN) -> Judge:
    """Trains and measures the judge, saves it in `run`/judge, and returns it."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([_STREAM, seed])
    start = time.monotonic()
    source = PictureSet(run / "pictures", "256x256")
    targets = torch.stack([attribute_indices(source.landscape(k)) for k in range(len(source))])
    network = JudgeNetwork().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(40, updates))
    weights = _cell_weights(source)
    log = TrainingLog(run / "judge" / "judge.jsonl", every=20)
    for update in range(updates):
        chosen = rng.integers(len(source), size=BATCH)
        pictures = spoil(source.pictures(chosen) / 2 + 0.5, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_native_bfloat16()):
            answers, cells = (x.float() for x in network.read(network.features(pictures)))
        losses, right = _compared(split_by_attribute(answers), targets[torch.from_numpy(chosen)])
        shown = F.binary_cross_entropy_with_logits(cells, _cell_targets(source, chosen), reduction="none")
        in_cells = (shown.mean(dim=(0, 2, 3)) * weights).sum()
        optimizer.zero_grad(set_to_none=True)
        (losses + in_cells).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        scheduler.step()
        log.add(update, loss=losses.item(), cells=in_cells.item(), right=right)
    log.close()
    record = {
        "training": {"updates": updates, "batch": BATCH, "pictures": len(source), "seed": seed},
        "seconds": round(time.monotonic() - start),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    judge = Judge(network, record)
    judge.save(run / "judge")
    complete(judge, run, num_held_out, num_drawn)
    return judge


def complete(judge: Judge, run: Path, num_held_out: int, num_drawn: int) -> None:
    """Adds its accuracy and the features of drawings to a judge, and saves it in `run`/judge."""
    vae = AutoencoderKL.from_pretrained(run / "vae") if (run / "vae").exists() else None
    judge.drawn = features_of_drawings(judge, num_drawn)
    judge.record["held_out"] = measure(judge, vae, num_held_out)
    judge.save(run / "judge")


def attribute_indices(landscape: Landscape) -> Tensor:
    """Returns the index of the value of each attribute."""
    return torch.tensor([values.index(getattr(landscape, name)) for name, values in ATTRIBUTES.items()])


def _compared(answers: Mapping[str, Tensor], goal: Tensor) -> tuple[Tensor, float]:
    """Returns the sum of the attributes' losses, and the accuracy."""
    losses = [F.cross_entropy(scores, goal[:, k]) for k, scores in enumerate(answers.values())]
    right = [(scores.argmax(dim=1) == goal[:, k]).float().mean() for k, scores in enumerate(answers.values())]
    return torch.stack(losses).sum(), float(torch.stack(right).mean())


def _cell_targets(source: PictureSet, chosen: NDArray[np.integer]) -> Tensor:
    """Returns the share of each cell that shows each of `CELL_VALUES`, `(B, K, rows, columns)`."""
    shares = source.labels(chosen)
    rows = source.height // TOKEN_PX
    cells = shares.transpose(1, 2).unflatten(2, (rows, -1))
    return torch.stack([cell_shares(source.landscape(int(k)), own) for k, own in zip(chosen, cells, strict=True)])


def cell_shares(landscape: Landscape, shares: Tensor) -> Tensor:
    """Returns the visible share of each of `CELL_VALUES` by cell, `(K, rows, columns)`, from shares of the regions."""
    seen = {
        name: shares[[REGIONS.index(region) for region in regions]].sum(dim=0) for name, regions in REGIONS_OF.items()
    }
    return torch.stack([seen[name] * (getattr(landscape, name) == value) for name, value in CELL_VALUES])


def _cell_weights(source: PictureSet, count: int = 400) -> Tensor:
    """Returns the weight of each of `CELL_VALUES`; small and rare things count more."""
    mean = _cell_targets(source, np.arange(min(count, len(source)))).mean(dim=(0, 2, 3))
    return (_CELL_SHARE / mean.clamp(min=1e-4)).clamp(0.5, 20.0)


def features_of_drawings(judge: Judge, count: int) -> NDArray[np.float32]:
    """Returns the judge's mean features `(count, F)` of held-out drawings that its accuracy is not measured on."""
    rng = np.random.default_rng([_STREAM, 0])
    drawn = [draw(held_out_landscape(rng), PICTURE_PX) for _ in range(count)]
    return judge.features(np.stack(drawn)).mean(axis=(2, 3))


def spoil(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Degrades pictures `(B, 3, h, w)` in [0, 1] with random loss of detail, blur, noise, brightness, colour cast."""
    spoilt = []
    for picture in pictures:
        if rng.random() < 0.25:
            picture = torch.lerp(picture, _in_patches(picture), float(rng.uniform(0.3, 1.0)))
        if rng.random() < 0.15:  # like small pictures enlarged to the judged size
            small = F.avg_pool2d(picture[None], 2)
            picture = F.interpolate(small, scale_factor=2.0, mode="bilinear")[0]
        if rng.random() < 0.5:
            picture = _blur(picture, float(rng.uniform(0.4, 2.0)))
        gain = torch.from_numpy(rng.uniform(0.88, 1.12) + rng.uniform(-0.04, 0.04, size=3)).float()
        picture = picture * gain[:, None, None] + float(rng.uniform(-0.04, 0.04))
        if rng.random() < 0.5:
            grain = int(rng.choice([1, 2, 4]))
            noise = torch.from_numpy(rng.standard_normal((1, 3, PICTURE_PX // grain, PICTURE_PX // grain), np.float32))
            picture = picture + rng.uniform(0.0, 0.05) * F.interpolate(noise, scale_factor=float(grain))[0]
        spoilt.append(picture.clamp(0.0, 1.0))
    return torch.stack(spoilt).contiguous(memory_format=torch.channels_last)


def _in_patches(picture: Tensor) -> Tensor:
    """Returns the picture that the latents alone determine, the worst that a decoder could make of them."""
    filters = patch_features()
    inverse = torch.linalg.pinv(filters.flatten(1)).T.reshape(filters.shape)
    latents = F.conv2d(picture[None], filters, stride=PATCH)
    return F.conv_transpose2d(latents, inverse, stride=PATCH)[0]


def _blur(picture: Tensor, sigma_px: float) -> Tensor:
    reach = 1 + int(2.5 * sigma_px)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma_px) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    x = F.pad(picture[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, kernel), kernel.transpose(2, 3))[:, 0]


def measure(judge: Judge, vae: AutoencoderKL | None, count: int) -> dict[str, Any]:
    """Returns the accuracy by attribute on held-out drawings at several sizes, degraded, and decoded."""
    found: dict[str, Any] = {"drawings": count}
    for size in (128, 256, 512):
        rng = np.random.default_rng([_STREAM, size])
        landscapes = [held_out_landscape(rng) for _ in range(count)]
        pictures = np.stack([draw(landscape, size) for landscape in landscapes])
        found[f"{size} px"] = right_answers(judge, pictures, landscapes)
        if size == PICTURE_PX:
            spoilt = spoil(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255, rng)
            found["256 px, spoilt"] = right_answers(judge, spoilt.permute(0, 2, 3, 1).numpy(), landscapes)
        if vae is not None and size == PICTURE_PX:
            found["256 px, decoded"] = right_answers(judge, _decoded(vae, pictures), landscapes)
    return found


@torch.no_grad()
def _decoded(vae: AutoencoderKL, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns pictures after encoding and decoding."""
    parts = []
    for part in torch.from_numpy(pictures).split(8):
        x = part.permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1) / 2 + 0.5)
    return torch.cat(parts).permute(0, 2, 3, 1).numpy()


def right_answers(judge: Judge, pictures: NDArray[Any], landscapes: list[Landscape]) -> dict[str, float]:
    """Returns the accuracy by attribute and overall."""
    right: Counter[str] = Counter()
    for seen, landscape in zip(judge(pictures), landscapes, strict=True):
        right.update({name: int(seen[name] == value) for name, value in landscape.attributes().items()})
    shares = {name: round(right[name] / len(landscapes), 4) for name in ATTRIBUTES}
    return {**shares, "all": round(right.total() / len(landscapes) / len(ATTRIBUTES), 4)}
