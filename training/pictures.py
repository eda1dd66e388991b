"""The pictures that the transformer learns from: their tokens, their captions, and what is drawn in each token.

Half of the pictures' cost at 32x32 tokens is attention, and neighbouring tokens teach the same; so most of the training
sees windows of a picture, at their true positions, and only the last part whole pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jitaccel.evaluation.scenes.draw import cover_local, draw
from jitaccel.evaluation.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
    describe,
    random_scene,
)

from .patch_encoder import encode_tokens

SIDE = 32  # tokens
NUM_LABELS = 1 + len(SHAPES) + len(COLOURS) + len(TEXTURES) + 3 + len(BACKGROUNDS)


@dataclass(frozen=True)
class Window:
    """A rectangle of a token grid; `stride` is how far apart its tokens lie, in tokens of the whole picture."""

    row: int
    column: int
    rows: int
    columns: int
    stride: int = 1

    def of(self, grid: Tensor) -> Tensor:
        """Returns the tokens `(B, rows * columns, ...)` of a grid `(B, SIDE, SIDE, ...)`."""
        part = grid[:, self.row : self.row + self.rows, self.column : self.column + self.columns]
        return part.flatten(1, 2)

    def ids(self) -> Tensor:
        """Returns the position ids `(rows * columns, 3)`, as FluxPipeline numbers them."""
        rows = self.stride * torch.arange(self.row, self.row + self.rows)
        columns = self.stride * torch.arange(self.column, self.column + self.columns)
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()


WHOLE = Window(0, 0, SIDE, SIDE)
HALF = Window(0, 0, SIDE // 2, SIDE // 2, stride=2)


def random_window(rng: np.random.Generator, num_tokens: int) -> Window:
    """Returns a square window of `num_tokens` tokens or, two times in five, a strip from border to border."""
    side, strip = round(num_tokens**0.5), num_tokens // SIDE
    shapes = ((side, side), (strip, SIDE), (SIDE, strip))
    rows, columns = shapes[rng.choice(3, p=[0.6, 0.2, 0.2])]
    return Window(_offset(rng, rows), _offset(rng, columns), rows, columns)


def _offset(rng: np.random.Generator, size: int) -> int:
    """Returns where a window starts; the borders are drawn more often, or their tokens would hardly be seen."""
    last = SIDE - size
    return int(np.clip(rng.integers(-last // 4, last + last // 4 + 1), 0, last))


class Pictures:
    """Scenes with their tokens `(n, SIDE, SIDE, 32)` and labels `(n, SIDE, SIDE, NUM_LABELS)`, in float16."""

    def __init__(self, scenes: list[Scene], side: int = SIDE) -> None:
        self.scenes = scenes
        self.tokens = torch.cat([_tokens(scenes[k : k + 50], side) for k in range(0, len(scenes), 50)])
        self.labels = torch.stack([torch.from_numpy(token_labels(scene, side)) for scene in scenes])

    @classmethod
    def random(cls, count: int, rng: np.random.Generator) -> Pictures:
        return cls([random_scene(rng) for _ in range(count)])

    def halved(self) -> Pictures:
        """Returns the same scenes drawn at half the size, on half the tokens a side."""
        return Pictures(self.scenes, SIDE // 2)

    def caption(self, k: int, rng: np.random.Generator) -> str:
        return describe(self.scenes[k], rng)[0]


def _tokens(scenes: list[Scene], side: int) -> Tensor:
    pictures = np.stack([draw(scene, 8 * side) for scene in scenes])
    return encode_tokens(pictures).half().unflatten(1, (side, side))


def token_labels(scene: Scene, side: int = SIDE) -> np.ndarray:
    """Returns what is drawn in each token, `(side, side, NUM_LABELS)`.

    How much of it things cover; weighted by that, their shape, colour, texture and size, and where in the thing the
    token lies; and the background.
    """
    labels = np.zeros((side, side, NUM_LABELS), np.float32)
    for thing in scene.things:
        labels[..., : -len(BACKGROUNDS)] += _thing_labels(thing, side)
    labels[..., list(BACKGROUNDS).index(scene.background) - len(BACKGROUNDS)] = 1.0
    return labels.astype(np.float16)


def _thing_labels(thing: Thing, side: int, sub: int = 2) -> np.ndarray:
    inside, u, v = cover_local(thing, sub * side)
    kinds = ((SHAPES, thing.shape), (tuple(COLOURS), thing.colour), (TEXTURES, thing.texture))
    constant = [1.0] + [float(name == said) for names, said in kinds for name in names] + [4.0 * thing.radius]
    parts = [inside * value for value in constant] + [inside * u, inside * v]
    cells = np.stack(parts, axis=-1).reshape(side, sub, side, sub, -1)
    return cells.mean(axis=(1, 3))
