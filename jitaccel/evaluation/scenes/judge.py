"""A judge of pictures: does a picture show what its caption says?

A small convolutional network says of every cell of a 256x256 picture whether a thing covers it, in which colour and
texture. Cells that hang together are a thing; a second, tiny network names the shape of its outline, and its area
then tells its size. `training/judge.py` trains both on drawn scenes; they never see a generated picture.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

from .scene import COLOURS, SHAPES, SIZES, TEXTURES, Claim

PICTURE_PX = 256
CELLS = 64  # a side; colour and texture are told at half that resolution
OUTLINE = 24  # cells a side of an outline brought to one size
OTHER = "other"  # an outline of no shape: half a thing, two in one
ATTRIBUTES = ("shape", "colour", "texture", "size", "place")
_KINDS: dict[str, Sequence[str]] = {"shape": (*SHAPES, OTHER), "colour": tuple(COLOURS), "texture": TEXTURES}
_AREAS = {  # of a shape of radius 1
    "circle": math.pi * 0.95**2,
    "square": 1.6**2,
    "triangle": 0.75 * math.sqrt(3),
    "star": 5 * 0.45 * math.sin(math.pi / 5),
    "ring": math.pi * (0.96**2 - 0.48**2),
}
_LARGE = (SIZES["small"][1] + SIZES["large"][0]) / 2
_MIN_CELLS = 30  # the smallest thing of a scene covers about 75
_SPLIT_SHARE = 0.2  # a second colour with this share of a thing makes two things of it that touch
_WEIGHTS, _RECORD = "judge.safetensors", "judge.json"


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """One thing that the judge sees. `x`, `y`: its centre as fractions of the canvas; `cells`: how many it covers."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    cells: int

    @property
    def places(self) -> tuple[str, str]:
        """The place words that are true of it."""
        return "left" if self.x < 0.5 else "right", "top" if self.y < 0.5 else "bottom"


@dataclass(frozen=True)
class Score:
    """How many attributes captions claim, and how many of those the pictures show, by kind; scores add up."""

    claimed: Counter[str] = field(default_factory=Counter)
    shown: Counter[str] = field(default_factory=Counter)

    @property
    def accuracy(self) -> float:
        """Share of the claimed attributes that are shown, in [0, 1]; 1 where nothing is claimed."""
        return self.shown.total() / self.claimed.total() if self.claimed else 1.0

    def __add__(self, other: Score) -> Score:
        return Score(self.claimed + other.claimed, self.shown + other.shown)


def compare(sightings: Sequence[Sighting], claims: Sequence[Claim]) -> Score:
    """Returns which claimed attributes the things that were seen have. A shape not seen fails all that is said of it.

    Where two things have the shape, the larger one is meant.
    """
    score = Score()
    seen = {sighting.shape: sighting for sighting in sorted(sightings, key=lambda sighting: sighting.cells)}
    for claim in claims:
        thing = seen.get(claim.shape)
        for name in ATTRIBUTES:
            said = getattr(claim, name)
            if said is not None:
                score.claimed[name] += 1
                score.shown[name] += thing is not None and _is_shown(name, said, thing)
    return score


def _is_shown(name: str, said: str, thing: Sighting) -> bool:
    return said in thing.places if name == "place" else bool(getattr(thing, name) == said)


class CellNetwork(nn.Module):
    """Scores of "covered" `(B, 64, 64)`, of colours and of textures `(B, k, 32, 32)`.

    From pictures `(B, 3, 256, 256)` in [0, 1].
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = _convolution(3, width // 2, kernel=7, stride=4)
        self.near = _convolution(width // 2, width, stride=2)
        self.around = _convolution(width, width)
        self.far = nn.Sequential(_convolution(width, width, stride=2), _convolution(width, width))
        self.merge = _convolution(2 * width, width, kernel=1)
        self.surface = nn.Conv2d(width, len(COLOURS) + len(TEXTURES), 1)
        self.edge = nn.Sequential(
            _convolution(width + width // 2, width // 2, kernel=1), _convolution(width // 2, width // 2)
        )
        self.covered = nn.Conv2d(width // 2, 1, 1)

    def features(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what all answers are read from, `(B, width, 32, 32)`, and the stem's, `(B, width / 2, 64, 64)`."""
        stem = self.stem(pictures - 0.5)
        near = self.near(stem)
        near = near + self.around(near)
        return self.merge(torch.cat([near, _grown(self.far(near))], dim=1)), stem

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        merged, stem = self.features(pictures)
        covered = self.covered(self.edge(torch.cat([stem, _grown(merged)], dim=1)))[:, 0]
        colour, texture = self.surface(merged).split([len(COLOURS), len(TEXTURES)], dim=1)
        return covered, colour, texture


def _convolution(inside: int, out: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def _grown(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")


class JudgeNetwork(nn.Module):
    """Both networks: what each cell shows, and which shape an outline `(B, 24, 24)` has."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = CellNetwork()
        self.outline = nn.Sequential(
            nn.Flatten(), nn.Linear(OUTLINE**2, 128), nn.ReLU(), nn.Linear(128, len(_KINDS["shape"]))
        )


def outline_of(share: NDArray[Any], inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Returns how a thing covers the square that just holds it, `(24, 24)`, whatever its size and place.

    share: how much of each cell is covered, (CELLS, CELLS). inside: the cells that are the thing's.
    """
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 3.0  # one cell of margin at each end
    steps = ((np.arange(OUTLINE) + 0.5) / OUTLINE - 0.5) * side
    places = np.meshgrid((rows[0] + rows[-1]) / 2 + steps, (columns[0] + columns[-1]) / 2 + steps, indexing="ij")
    own = np.where(ndimage.binary_dilation(inside, np.ones((3, 3))), share, 0.0)
    sampled: NDArray[np.float32] = ndimage.map_coordinates(own, places, order=1, output=np.float32)
    return sampled


class Judge:
    """Sees the things in pictures, and scores captions by them. `record`: how it was trained, how well it does."""

    def __init__(self, network: JudgeNetwork, record: Mapping[str, Any] | None = None) -> None:
        self.network = network.eval()
        self.record = dict(record or {})

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Returns the judge that `save` wrote. Raises FileNotFoundError, or ValueError for one of other scenes."""
        record = json.loads((folder / _RECORD).read_text())
        kinds = record.pop("kinds")
        if kinds != {name: list(names) for name, names in _KINDS.items()}:
            raise ValueError(f"Judge.load: folder must hold a judge of {_KINDS}, got one of {kinds}; train it anew")
        network = JudgeNetwork()
        weights = load_file(folder / _WEIGHTS)
        network.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
        return cls(network, record)

    def save(self, folder: Path) -> None:
        """Writes weights (float16) and record."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: w.contiguous() for name, w in self.network.state_dict().items()}
        halves = {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
        save_file(halves, folder / _WEIGHTS)
        (folder / _RECORD).write_text(json.dumps({"kinds": _KINDS, **self.record}, indent=1) + "\n")

    def __call__(self, pictures: NDArray[Any], batch: int = 16) -> list[tuple[Sighting, ...]]:
        """Returns what is seen in each of the pictures `(B, 256, 256, 3)`, uint8 or floats in [0, 1]."""
        found = []
        with torch.inference_mode():
            for part in _to_tensor(pictures).split(batch):
                covered, colour, texture = self.network.cells(part)
                surface = [_grown(scores.softmax(dim=1)).numpy() for scores in (colour, texture)]
                shares = covered.sigmoid().numpy()
                found += [tuple(self._things(*maps)) for maps in zip(shares, *surface, strict=True)]
        return found

    def features(self, pictures: NDArray[Any], batch: int = 16) -> NDArray[np.float32]:
        """Returns the classifier's features of pictures `(B, 256, 256, 3)`, `(B, F, 32, 32)`, for distances of them."""
        with torch.inference_mode():
            parts = [self.network.cells.features(part)[0].numpy() for part in _to_tensor(pictures).split(batch)]
        return np.concatenate(parts)

    def score(self, picture: NDArray[Any], claims: Sequence[Claim]) -> Score:
        """Returns which of a caption's claims the picture `(256, 256, 3)` shows."""
        return compare(self(picture[None])[0], claims)

    def _things(self, share: NDArray[Any], colour: NDArray[Any], texture: NDArray[Any]) -> Iterator[Sighting]:
        for inside in components(share > 0.5, colour):
            outline = torch.from_numpy(outline_of(share, inside))
            *chances, other = self.network.outline(outline[None]).softmax(dim=1)[0].tolist()
            if other > 0.5:
                continue
            shape = SHAPES[int(np.argmax(chances))]
            rows, columns = np.nonzero(inside)
            radius = math.sqrt(len(rows) / _AREAS[shape]) / CELLS
            yield Sighting(
                shape=shape,
                colour=_KINDS["colour"][int(colour[:, inside].sum(axis=1).argmax())],
                texture=_KINDS["texture"][int(texture[:, inside].sum(axis=1).argmax())],
                size="large" if radius > _LARGE else "small",
                x=float(columns.mean() + 0.5) / CELLS,
                y=float(rows.mean() + 0.5) / CELLS,
                cells=len(rows),
            )


def components(covered: NDArray[np.bool_], colour: NDArray[Any]) -> Iterator[NDArray[np.bool_]]:
    """Yields the cells of each thing: those that hang together, apart where two colours share them."""
    labels, count = ndimage.label(covered)
    for label in range(1, count + 1):
        inside = labels == label
        if inside.sum() < _MIN_CELLS:
            continue
        shares = np.bincount(colour[:, inside].argmax(axis=0), minlength=len(colour)) / inside.sum()
        strong = np.flatnonzero(shares >= _SPLIT_SHARE)
        if len(strong) < 2:
            yield inside
            continue
        nearest = strong[colour[strong].argmax(axis=0)]
        for one in strong:
            parts, num_parts = ndimage.label(inside & (nearest == one))
            sizes = np.bincount(parts.ravel(), minlength=num_parts + 1)[1:]
            if num_parts and sizes.max() >= _MIN_CELLS:
                yield parts == 1 + int(sizes.argmax())


def _to_tensor(pictures: NDArray[Any]) -> Tensor:
    if pictures.ndim != 4 or pictures.shape[1:] != (PICTURE_PX, PICTURE_PX, 3):
        raise ValueError(
            f"Judge: pictures must be (B, {PICTURE_PX}, {PICTURE_PX}, 3), got {pictures.shape}; "
            f"it was trained on pictures of that size alone"
        )
    scale = 255.0 if pictures.dtype == np.uint8 else 1.0
    x = torch.from_numpy(np.ascontiguousarray(pictures)).float() / scale
    return x.permute(0, 3, 1, 2).contiguous()
