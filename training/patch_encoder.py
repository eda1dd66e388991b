"""The encoder of the embedded autoencoder: written down, not trained.

Eight linear features of every 4x4 patch, six of the brightness and two of the colour (the lowest frequencies of a
discrete cosine transform), are what a small autoencoder would learn for flat, sharp-edged pictures. Knowing them in
closed form costs no training, makes latents of a data set nearly free, and lets transformer and decoder be trained
at the same time. `write_encoder` puts them into the weights of diffusers' `AutoencoderKL`, exactly but for rounding.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from jitaccel.evaluation.scenes.draw import draw
from jitaccel.evaluation.scenes.scene import random_scene

PATCH = 4
_LUMA = torch.tensor([0.299, 0.587, 0.114])
_BLUE = torch.tensor([-0.169, -0.331, 0.5])
_RED = torch.tensor([0.5, -0.419, -0.081])
_BRIGHTNESS_FREQUENCIES = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
FEATURE_SCALES = (1.7, 9.0, 9.0, 16.0, 16.0, 16.0, 3.6, 3.2)  # towards equal variance; found on drawn scenes


def _cosine(frequency: int) -> Tensor:
    positions = (torch.arange(PATCH, dtype=torch.float64) + 0.5) * math.pi * frequency / PATCH
    return positions.cos() * math.sqrt((1 if frequency == 0 else 2) / PATCH)


def patch_features() -> Tensor:
    """Returns the analysis filters `(8, 3, 4, 4)`: feature, colour, row, column."""
    filters = [
        _LUMA[:, None, None] * _cosine(v)[:, None] * _cosine(u)[None, :] / PATCH for v, u in _BRIGHTNESS_FREQUENCIES
    ]
    filters += [colour[:, None, None] * _cosine(0)[:, None] * _cosine(0)[None, :] / PATCH for colour in (_BLUE, _RED)]
    return (torch.stack(filters) * torch.tensor(FEATURE_SCALES)[:, None, None, None]).float()


def encode(pictures: Tensor) -> Tensor:
    """Returns the latents `(B, 8, h / 4, w / 4)` of pictures `(B, 3, h, w)` in [-1, 1], before scale and shift."""
    return nn.functional.conv2d(pictures, patch_features(), stride=PATCH)


@functools.cache
def latent_statistics() -> tuple[float, float]:
    """Returns shift and scale that give the latents of drawn scenes mean 0 and variance 1 over all features."""
    rng = np.random.default_rng(99)
    latents = encode(pictures_to_tensor(np.stack([draw(random_scene(rng)) for _ in range(100)])))
    return float(latents.mean()), float(1 / latents.std())


def pictures_to_tensor(pictures: NDArray[np.float32]) -> Tensor:
    """Returns pictures `(B, h, w, 3)` in [0, 1] as `(B, 3, h, w)` in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).mul(2).sub(1)


def encode_tokens(pictures: NDArray[np.float32]) -> Tensor:
    """Returns the transformer's tokens `(B, h * w / 64, 32)` of pictures `(B, h, w, 3)`, packed as diffusers does."""
    shift, scale = latent_statistics()
    latents = (encode(pictures_to_tensor(pictures)) - shift) * scale
    batch, channels, rows, columns = latents.shape
    cells = latents.view(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, rows * columns // 4, channels * 4)
