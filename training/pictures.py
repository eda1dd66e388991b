"""The training pictures: drawn once into files in the run's folder, and read as memory maps, also at smaller sizes.

They are drawn beforehand so that training does not wait for drawing. A set has one file of pictures (uint8) and one
with the regions drawn in each token (uint8). A landscape is identified by a number. Its caption is written in a new
wording each time it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from jitaccel.evaluation.scenes.canvas import REGIONS
from jitaccel.evaluation.scenes.draw import draw, draw_regions
from jitaccel.evaluation.scenes.prompts import training_landscape
from jitaccel.evaluation.scenes.scene import Landscape

TOKEN_PX = 8
NUM_LABELS = len(REGIONS)
_CHUNK = 100


@dataclass(frozen=True, kw_only=True)
class SetSize:
    """A set of `count` pictures of `width` x `height` pixels."""

    width: int
    height: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}"


SETS = (
    SetSize(width=256, height=256, count=12_000),
    SetSize(width=192, height=128, count=2_000),
    SetSize(width=128, height=192, count=2_000),
)


def landscape_of(number: int, size: str) -> Landscape:
    """Returns the landscape behind a picture of a set."""
    width, height = (int(side) for side in size.split("x"))
    return training_landscape(np.random.default_rng([17, width, height, number]))


def draw_sets(folder: Path, workers: int, sets: Sequence[SetSize] = SETS) -> None:
    """Draws all sets that do not exist yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for size in sets:
        if _file(folder, size.name, "labels").exists():
            continue
        pictures = np.lib.format.open_memmap(
            _file(folder, size.name, "drawing"), "w+", np.uint8, (size.count, size.height, size.width, 3)
        )
        labels = np.empty((size.count, NUM_LABELS, size.height // TOKEN_PX, size.width // TOKEN_PX), np.uint8)
        starts = range(0, size.count, _CHUNK)
        with ProcessPoolExecutor(workers) as pool:
            for start, (some, shares) in zip(starts, pool.map(_draw_chunk, [(size, k) for k in starts]), strict=True):
                pictures[start : start + _CHUNK], labels[start : start + _CHUNK] = some, shares
        pictures.flush()
        _file(folder, size.name, "drawing").rename(_file(folder, size.name, "pictures"))
        np.save(_file(folder, size.name, "labels"), labels)


def _draw_chunk(task: tuple[SetSize, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    size, start = task
    pictures, labels = [], []
    for number in range(start, min(start + _CHUNK, size.count)):
        landscape = landscape_of(number, size.name)
        pictures.append(draw(landscape, size.width, size.height))
        regions = draw_regions(landscape, size.width // 2, size.height // 2)
        half = TOKEN_PX // 2
        cells = regions.reshape(NUM_LABELS, regions.shape[1] // half, half, regions.shape[2] // half, half)
        labels.append((255 * cells.mean(axis=(2, 4))).round().astype(np.uint8))
    return np.stack(pictures), np.stack(labels)


def _file(folder: Path, size: str, kind: str) -> Path:
    return folder / f"{kind}-{size}.npy"


class PictureSet:
    """One set, which can be read at its own size or smaller."""

    def __init__(self, folder: Path, size: str) -> None:
        self._pictures = np.load(_file(folder, size, "pictures"), mmap_mode="r")
        self._labels = np.load(_file(folder, size, "labels"), mmap_mode="r")
        self._size = size

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def height(self) -> int:
        """Height of the pictures in pixels."""
        return int(self._pictures.shape[1])

    def landscape(self, number: int) -> Landscape:
        return landscape_of(number, self._size)

    def pictures(self, numbers: NDArray[np.integer], rows: int | None = None) -> Tensor:
        """Returns pictures `(B, 3, h, w)` in [-1, 1], `rows` tokens high; None keeps their size."""
        chosen = torch.from_numpy(np.stack([self._pictures[k] for k in numbers])).permute(0, 3, 1, 2).float()
        factor = 1.0 if rows is None else rows * TOKEN_PX / chosen.shape[2]
        return _resized(chosen / 127.5 - 1, factor)

    def labels(self, numbers: NDArray[np.integer], rows: int | None = None) -> Tensor:
        """Returns the share of every region in each token, `(B, N, NUM_LABELS)`."""
        chosen = torch.from_numpy(np.stack([self._labels[k] for k in numbers])).float() / 255
        factor = 1.0 if rows is None else rows / chosen.shape[2]
        return _resized(chosen, factor).flatten(2).transpose(1, 2)


def _resized(x: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return x
    if factor == 0.5:
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=factor, mode="bilinear", antialias=True)
