"""A judge of pictures: does a picture show what its caption says?

A small convolutional network classifies every attribute of `scene.ATTRIBUTES`. `training/judge.py` trains it on drawn
landscapes with blur and other degradations; it never sees a generated picture. Its features also serve to measure
distances between pictures and between sets of pictures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import Claims
from .scene import ATTRIBUTES, NONE

PICTURE_PX = 256  # pictures are resized to this height before they are judged
UNSURE = "unsure"  # the judge's answer if no value has a probability above one half
NUM_FEATURES = 96
_COLUMNS = 6  # of the summary of where something is
REGIONS_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "time": ("sky",),
        "sky": ("sky", "cloud"),
        "light": ("light",),
        "mountains": ("mountains",),
        "water": ("water",),
        "ground": ("ground", "plants"),
        "flowers": ("plants",),
        "thing": ("thing",),
        "paint": ("thing",),
    }
)
"""The region of `canvas.REGIONS` in which the value of an attribute is visible."""
CELL_VALUES = tuple((name, value) for name in REGIONS_OF for value in ATTRIBUTES[name] if value != NONE)
"""The network's outputs for each cell: attribute and value."""
# An attribute of an object counts only where the object itself is recognised.
_NEEDS = {"paint": "thing", "thing_place": "thing", "flowers": "ground"}
_WEIGHTS, _RECORD, _DRAWN = "judge.safetensors", "judge.json", "drawn.npy"


@dataclass(frozen=True)
class Score:
    """Number of attributes that captions claim, and of those that the pictures show, by attribute; scores add up."""

    claimed: Counter[str] = field(default_factory=Counter)
    shown: Counter[str] = field(default_factory=Counter)

    @property
    def accuracy(self) -> float:
        """Share of the claimed attributes that are shown, in [0, 1]; 1 if none is claimed."""
        return self.shown.total() / self.claimed.total() if self.claimed else 1.0

    def __add__(self, other: Score) -> Score:
        return Score(self.claimed + other.claimed, self.shown + other.shown)


def compare(seen: Mapping[str, str], claims: Claims) -> Score:
    """Returns which claimed attributes were seen.

    Colour and place of an object count as missing if the object itself was not recognised.
    """
    score = Score()
    for name, said in claims.items():
        needed = _NEEDS.get(name)
        found = needed is None or needed not in claims or seen[needed] == claims[needed]
        score.claimed[name] += 1
        score.shown[name] += found and seen[name] == said
    return score


class JudgeNetwork(nn.Module):
    """Scores of all values of all attributes, `(B, num_values)`, from pictures `(B, 3, h, w)` in [0, 1].

    First classifies, for every cell of 8x8 pixels, which values are visible there (`CELL_VALUES`), then derives the
    scores from that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, 32, kernel=7, stride=4)
        self.near = nn.Sequential(_convolution(32, 64, stride=2), _convolution(64, 64))
        self.around = _convolution(64, 64)
        self.far = nn.Sequential(_convolution(64, 128, stride=2), _convolution(128, 128))
        self.farther = _convolution(128, 128)
        self.merge = _convolution(64 + 128, NUM_FEATURES, kernel=1)
        self.shown = nn.Conv2d(NUM_FEATURES, len(CELL_VALUES), 1)
        self.answer = nn.Sequential(
            nn.Linear(2 * NUM_FEATURES + (2 + _COLUMNS) * len(CELL_VALUES), 256),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(256, sum(len(values) for values in ATTRIBUTES.values())),
        )
        assert self.shown.bias is not None
        nn.init.constant_(self.shown.bias, -3.0)  # most values are not visible in most cells

    def features(self, pictures: Tensor) -> Tensor:
        """Returns the features from which all answers are computed, `(B, NUM_FEATURES, h / 8, w / 8)`."""
        near = self.near(self.stem(pictures - 0.5))
        near = near + self.around(near)
        far = self.far(near)
        far = far + self.farther(far)
        grown = F.interpolate(far, size=near.shape[-2:], mode="bilinear")
        merged: Tensor = self.merge(torch.cat([near, grown], dim=1))
        return merged

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the answers `(B, num_values)` and the scores of `CELL_VALUES` by cell, `(B, K, h / 8, w / 8)`."""
        scores = self.shown(features)
        seen = scores.sigmoid()
        columns = F.adaptive_avg_pool2d(seen.amax(dim=2, keepdim=True), (1, _COLUMNS)).flatten(1)
        whole = [part for x in (features, seen) for part in (x.mean(dim=(2, 3)), x.amax(dim=(2, 3)))]
        return self.answer(torch.cat([*whole, columns], dim=1)), scores

    def forward(self, pictures: Tensor) -> Tensor:
        return self.read(self.features(pictures))[0]


def _convolution(inside: int, out: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def split_by_attribute(answers: Tensor) -> dict[str, Tensor]:
    """Returns, for each attribute, the scores of its values, `(B, len(values))`."""
    parts = answers.split([len(values) for values in ATTRIBUTES.values()], dim=1)
    return dict(zip(ATTRIBUTES, parts, strict=True))


class Judge:
    """Classifies the attributes of pictures, and scores captions by them.

    Attributes:
        network: The trained network.
        record: How it was trained, and its accuracy on held-out drawings.
        drawn: Mean features `(P, NUM_FEATURES)` of held-out drawings, to measure the distance of pictures from them.
    """

    def __init__(
        self,
        network: JudgeNetwork,
        record: Mapping[str, Any] | None = None,
        drawn: NDArray[np.floating] | None = None,
    ) -> None:
        self.network = network.eval()
        self.record = dict(record or {})
        self.drawn = drawn

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Returns the judge that `save` wrote. Raises FileNotFoundError, or ValueError for a judge of another world."""
        record = json.loads((folder / _RECORD).read_text())
        attributes = record.pop("attributes", None)
        if attributes != {name: list(values) for name, values in ATTRIBUTES.items()}:
            raise ValueError(
                f"Judge.load: {folder} must hold a judge of landscapes as they are drawn now, got another; "
                "train it again with `python -m training judge`"
            )
        network = JudgeNetwork()
        weights = load_file(folder / _WEIGHTS)
        network.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
        drawn = np.load(folder / _DRAWN).astype(np.float32) if (folder / _DRAWN).exists() else None
        return cls(network, record, drawn)

    def save(self, folder: Path) -> None:
        """Writes weights and features of drawings (float16), and the record."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: w.contiguous() for name, w in self.network.state_dict().items()}
        halves = {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
        save_file(halves, folder / _WEIGHTS)
        if self.drawn is not None:
            np.save(folder / _DRAWN, self.drawn.astype(np.float16))
        (folder / _RECORD).write_text(json.dumps({"attributes": dict(ATTRIBUTES), **self.record}, indent=1) + "\n")

    def __call__(self, pictures: NDArray[Any], batch: int = 16) -> list[dict[str, str]]:
        """Returns the attributes seen in each picture of `(B, h, w, 3)`, uint8 or floats in [0, 1], of any size."""
        found = []
        with torch.inference_mode():
            for part in _prepared(pictures, batch):
                by_name = split_by_attribute(self.network(part))
                beliefs = {name: scores.softmax(dim=1).max(dim=1) for name, scores in by_name.items()}
                found += [
                    {
                        name: ATTRIBUTES[name][int(belief.indices[k])] if belief.values[k] > 0.5 else UNSURE
                        for name, belief in beliefs.items()
                    }
                    for k in range(len(part))
                ]
        return found

    def features(self, pictures: NDArray[Any], batch: int = 16) -> NDArray[np.float32]:
        """Returns the network's features of pictures for distances, `(B, NUM_FEATURES, 32, 32)` for square pictures."""
        with torch.inference_mode():
            return np.concatenate([self.network.features(part).numpy() for part in _prepared(pictures, batch)])

    def score(self, picture: NDArray[Any], claims: Claims) -> Score:
        """Returns which of a caption's claims the picture `(h, w, 3)` shows."""
        return compare(self(picture[None])[0], claims)


def _prepared(pictures: NDArray[Any], batch: int) -> Sequence[Tensor]:
    """Returns batches `(B, 3, PICTURE_PX, w)` of floats in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    return [
        at_judged_size(part.float() / (255.0 if part.dtype == torch.uint8 else 1.0)) for part in pixels.split(batch)
    ]


def at_judged_size(pictures: Tensor) -> Tensor:
    """Returns pictures `(B, 3, h, w)` resized to the height at which they are judged."""
    height, width = pictures.shape[-2:]
    if height == PICTURE_PX:
        return pictures
    size = (PICTURE_PX, round(width * PICTURE_PX / height / 8) * 8)
    return F.interpolate(pictures, size=size, mode="bilinear", antialias=True)
