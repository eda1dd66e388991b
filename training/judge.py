"""Trains the judge on drawn scenes, spoilt a little, and measures it on scenes it has not seen.

What generated pictures suffer from is blur, noise and wrong brightness. The training pictures have some of each, so
that the judge looks at the attributes and not at the sharpness. Every scene is drawn once, kept for a while, and
spoilt anew each time it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from jitaccel.evaluation.scenes.draw import cover, draw
from jitaccel.evaluation.scenes.judge import (
    ATTRIBUTES,
    CELLS,
    OUTLINE,
    Judge,
    JudgeNetwork,
    Score,
    compare,
    outline_of,
)
from jitaccel.evaluation.scenes.scene import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Claim,
    Scene,
    Thing,
    describe,
    random_scene,
)

from .log import TrainingLog, warmup_cosine
from .patch_encoder import PATCH, patch_features

BATCH = 8
_KEPT, _NEW_PER_BATCH = 240, 3
_IGNORED = -1
_OTHER_SHARE = 0.1

Sample = tuple[Tensor, Tensor, Tensor, Tensor]
"""A picture (3, 256, 256), how much of each cell is covered (64, 64), and colour and texture classes (32, 32)."""


def train_judge(out: Path, updates: int = 1000, outlines: int = 12000, seed: int = 7, num_held_out: int = 300) -> Judge:
    """Trains, measures and saves the judge into `out`; returns it."""
    torch.manual_seed(seed)
    start = time.monotonic()
    network = JudgeNetwork()
    outline_accuracy = _train_outline(network, outlines, np.random.default_rng([seed, 0]))
    log = TrainingLog(out / "judge.jsonl", every=20)
    _train_cells(network, updates, np.random.default_rng([seed, 1]), log)
    judge = Judge(network)
    judge.record = {
        "training": {"updates": updates, "batch": BATCH, "outlines": outlines, "seed": seed},
        "seconds": round(time.monotonic() - start),
        "parameters": sum(p.numel() for p in network.parameters()),
        "outline_accuracy": outline_accuracy,
    }
    judge.save(out)
    judge.record["held_out"] = measure(judge, num_held_out, np.random.default_rng([seed, 2]))
    judge.save(out)
    return judge


def _train_cells(network: JudgeNetwork, updates: int, rng: np.random.Generator, log: TrainingLog) -> None:
    cells = network.cells.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(cells.parameters(), lr=4e-3, weight_decay=1e-3, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(20, updates))
    for update, batch in zip(range(updates), _batches(rng), strict=False):
        pictures, shares, *classes = batch
        covered, *scores = cells(pictures)
        losses = [F.binary_cross_entropy_with_logits(covered, shares)]
        losses += [F.cross_entropy(s, c, ignore_index=_IGNORED) for s, c in zip(scores, classes, strict=True)]
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(cells.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        log.add(update, **{k: x.item() for k, x in zip(("covered", "colour", "texture"), losses, strict=True)})
    log.close()


def _batches(rng: np.random.Generator) -> Iterator[Sample]:
    recent: deque[Sample] = deque(maxlen=_KEPT)
    while True:
        for _ in range(_NEW_PER_BATCH if len(recent) >= 4 * BATCH else BATCH):
            recent.append(_sample(random_scene(rng)))
        chosen = [recent[k] for k in rng.integers(len(recent), size=BATCH)]
        pictures, shares, colours, textures = (torch.stack(parts) for parts in zip(*chosen, strict=True))
        yield spoil(pictures, rng), shares, colours, textures


def _sample(scene: Scene) -> Sample:
    share = np.zeros((CELLS, CELLS), np.float32)
    colour, texture = (torch.full((CELLS // 2, CELLS // 2), _IGNORED) for _ in range(2))
    for thing in scene.things:
        covered = cell_shares(thing)
        share += covered
        inside = torch.from_numpy(_halved(covered) >= 0.4)
        colour[inside] = list(COLOURS).index(thing.colour)
        texture[inside] = TEXTURES.index(thing.texture)
    picture = torch.from_numpy(draw(scene)).permute(2, 0, 1)
    return picture, torch.from_numpy(share).clamp(0, 1), colour, texture


def cell_shares(thing: Thing) -> NDArray[np.float32]:
    """Returns how much of each cell `(CELLS, CELLS)` a thing covers, in quarters."""
    return _halved(cover(thing, 2 * CELLS).astype(np.float32))


def _halved(x: NDArray[np.float32]) -> NDArray[np.float32]:
    side = x.shape[0] // 2
    return x.reshape(side, 2, side, 2).mean(axis=(1, 3))


def spoil(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Returns pictures `(B, 3, h, w)` with random loss of detail, blur, noise, brightness, contrast and colour cast."""
    spoilt = []
    for picture in pictures:
        if rng.random() < 0.35:
            picture = torch.lerp(picture, _in_patches(picture), float(rng.uniform(0.3, 1.0)))
        if rng.random() < 0.6:
            picture = _blur(picture, float(rng.uniform(0.4, 1.8)))
        gain = torch.from_numpy(rng.uniform(0.85, 1.15) + rng.uniform(-0.05, 0.05, size=3)).float()
        picture = picture * gain[:, None, None] + float(rng.uniform(-0.06, 0.06))
        if rng.random() < 0.6:
            grain = int(rng.choice([1, 2, 4]))
            side = picture.shape[-1] // grain
            noise = torch.from_numpy(rng.standard_normal((1, 3, side, side), np.float32))
            picture = picture + rng.uniform(0.0, 0.06) * F.interpolate(noise, scale_factor=float(grain))[0]
        spoilt.append(picture.clamp(0.0, 1.0))
    return torch.stack(spoilt).contiguous(memory_format=torch.channels_last)


@functools.cache
def _patch_inverse() -> Tensor:
    filters = patch_features()
    return torch.linalg.pinv(filters.flatten(1)).T.reshape(filters.shape).contiguous()


def _in_patches(picture: Tensor) -> Tensor:
    """Returns what the latents of a picture alone determine: the worst that a decoder could make of them."""
    latents = F.conv2d(picture[None], patch_features(), stride=PATCH)
    return F.conv_transpose2d(latents, _patch_inverse(), stride=PATCH)[0]


def _blur(picture: Tensor, sigma_px: float) -> Tensor:
    reach = 1 + int(2.5 * sigma_px)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma_px) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    x = F.pad(picture[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, kernel), kernel.transpose(2, 3))[:, 0]


def _train_outline(network: JudgeNetwork, count: int, rng: np.random.Generator) -> float:
    """Trains on drawn outlines for a dozen passes; returns the accuracy on a tenth that is held out."""
    pairs = [random_outline(rng) for _ in range(count)]
    outlines = torch.from_numpy(np.stack([outline for outline, _ in pairs]))
    labels = torch.tensor([label for _, label in pairs])
    last = count - count // 10
    optimizer = torch.optim.AdamW(network.outline.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(12):
        for number, chosen in enumerate(torch.randperm(last).split(64)):
            x = outlines[chosen] + 0.1 * torch.randn(len(chosen), OUTLINE, OUTLINE)
            x = x.flip(2) if number % 2 else x
            loss = F.cross_entropy(network.outline(x), labels[chosen], label_smoothing=0.02)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = network.outline(outlines[last:]).argmax(dim=1) == labels[last:]
    return round(float(right.float().mean()), 4)


def random_outline(rng: np.random.Generator) -> tuple[NDArray[np.float32], int]:
    """Returns an outline as the judge would cut it out, and the index of its shape; one in seven is of no shape."""
    while True:
        thing = random_scene(rng, 1).things[0]
        share = cell_shares(thing)
        label = SHAPES.index(thing.shape)
        if rng.random() < _OTHER_SHARE:
            share, label = _misshapen(thing, share, rng), len(SHAPES)
        share = _as_seen(share, rng)
        labels, found = ndimage.label(share > 0.5)
        if found:
            largest = 1 + int(np.bincount(labels.ravel())[1:].argmax())
            return outline_of(share, labels == largest), label


def _as_seen(share: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Returns what the cells' network may make of it: bent a little, corners rounded, edges as sharp as a sigmoid's."""
    bend = [ndimage.gaussian_filter(rng.standard_normal(share.shape), rng.uniform(2.0, 6.0)) for _ in range(2)]
    reach = rng.uniform(0.0, 0.8)
    places = [axis + reach * b / b.std() for axis, b in zip(np.mgrid[:CELLS, :CELLS], bend, strict=True)]
    bent = ndimage.gaussian_filter(ndimage.map_coordinates(share, places, order=1), rng.uniform(0.0, 1.3))
    grain = rng.uniform(0.0, 0.5) * rng.standard_normal(share.shape) * bent * (1 - bent)
    return (1 / (1 + np.exp(-rng.uniform(6.0, 20.0) * (bent + grain - rng.uniform(0.4, 0.6))))).astype(np.float32)


def _misshapen(thing: Thing, share: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Returns half of a thing, or a thing grown together with another one."""
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * math.pi)
        y, x = np.mgrid[:CELLS, :CELLS] / CELLS
        beyond = (x - thing.x) * math.cos(angle) + (y - thing.y) * math.sin(angle)
        return np.where(beyond > rng.uniform(-0.2, 0.2) * thing.radius, share, 0.0).astype(np.float32)
    angle, reach = rng.uniform(0, 2 * math.pi), rng.uniform(0.7, 1.5) * thing.radius
    other = random_scene(rng, 1).things[0]
    moved = dataclasses.replace(other, x=thing.x + reach * math.cos(angle), y=thing.y + reach * math.sin(angle))
    return np.maximum(share, cell_shares(moved))


def measure(judge: Judge, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """Returns, for clean and for spoilt drawings, how often true claims are found and false ones rejected."""
    scenes = [random_scene(rng) for _ in range(count)]
    claims = [describe(scene, rng, detail=1.0)[1] for scene in scenes]
    wrong = [[_falsify(claim, scene, rng) for claim in said] for scene, said in zip(scenes, claims, strict=True)]
    clean = np.stack([draw(scene) for scene in scenes])
    spoilt = spoil(torch.from_numpy(clean).permute(0, 3, 1, 2), rng).permute(0, 2, 3, 1).numpy()
    return {"scenes": count, **{k: _rates(judge, x, claims, wrong) for k, x in (("clean", clean), ("spoilt", spoilt))}}


def _rates(
    judge: Judge, pictures: NDArray[Any], claims: Sequence[Sequence[Claim]], wrong: Sequence[Sequence[dict[str, Claim]]]
) -> dict[str, dict[str, float]]:
    sightings = judge(pictures)
    true = sum((compare(seen, said) for seen, said in zip(sightings, claims, strict=True)), Score())
    believed: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    for seen, variants in zip(sightings, wrong, strict=True):
        for name, claim in (item for by_name in variants for item in by_name.items()):
            tried[name] += 1
            believed[name] += compare(seen, (claim,)).shown[name]
    return {
        name: {
            "found": round(true.shown[name] / true.claimed[name], 4),
            "rejected": round(1 - believed[name] / tried[name], 4),
        }
        for name in ATTRIBUTES
    }


def _falsify(claim: Claim, scene: Scene, rng: np.random.Generator) -> dict[str, Claim]:
    """Returns for each attribute that is claimed the claim with that attribute, and it alone, made wrong."""
    present = {thing.shape for thing in scene.things}
    allowed = {"shape": [s for s in SHAPES if s not in present], "colour": list(COLOURS), "texture": list(TEXTURES)}
    allowed |= {"size": list(SIZES), "place": list(PLACES)}
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    found = {}
    for name in ATTRIBUTES:
        said = getattr(claim, name)
        if said is None:
            continue
        other = opposite[said] if name == "place" else str(rng.choice([o for o in allowed[name] if o != said]))
        found[name] = dataclasses.replace(claim, **{name: other})
    return found
