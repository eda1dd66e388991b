"""The encoder of the embedded autoencoder, which is given in closed form instead of trained.

It computes sixteen linear features of every 4x4 patch: ten of the brightness and three of each colour difference (the
lowest frequencies of a discrete cosine transform). The closed form needs no training, makes latents of a data set
nearly free, and allows transformer and decoder to be trained at the same time. `decoder.write_encoder` writes it into
the weights of diffusers' `AutoencoderKL`, exactly up to rounding.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

PATCH = 4
NUM_FEATURES = 16
_LUMA = torch.tensor([0.299, 0.587, 0.114])
_BLUE = torch.tensor([-0.169, -0.331, 0.5])
_RED = torch.tensor([0.5, -0.419, -0.081])
_LUMA_FREQUENCIES = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (0, 3), (3, 0))
_COLOUR_FREQUENCIES = ((0, 0), (0, 1), (1, 0))
# Standard deviations of the features on drawn landscapes, measured by `measure_deviations`.
_DEVIATIONS = (
    0.437,
    0.039,
    0.046,
    0.020,
    0.018,
    0.022,
    0.012,
    0.012,
    0.008,
    0.013,
    0.174,
    0.015,
    0.021,
    0.165,
    0.017,
    0.023,
)
_EVENNESS = 0.65  # 0 keeps the deviations, 1 makes them equal; in between, detail is neither lost nor dominant


def _cosine(frequency: int) -> Tensor:
    positions = (torch.arange(PATCH, dtype=torch.float64) + 0.5) * math.pi * frequency / PATCH
    return positions.cos() * math.sqrt((1 if frequency == 0 else 2) / PATCH)


@functools.cache
def _plain_features() -> Tensor:
    """Returns the unscaled filters, in which the mean of a patch has weight 1."""
    parts = [(_LUMA, frequency) for frequency in _LUMA_FREQUENCIES]
    parts += [(colour, frequency) for colour in (_BLUE, _RED) for frequency in _COLOUR_FREQUENCIES]
    filters = [c[:, None, None] * _cosine(v)[:, None] * _cosine(u)[None, :] / PATCH for c, (v, u) in parts]
    return torch.stack(filters).float()


@functools.cache
def patch_features() -> Tensor:
    """Returns the filters `(16, 3, 4, 4)`: feature, colour, row, column."""
    deviations = torch.tensor(_DEVIATIONS)
    wanted = (deviations / deviations[0]) ** (1 - _EVENNESS)
    return _plain_features() * (wanted / deviations)[:, None, None, None]


@functools.cache
def latent_statistics() -> tuple[float, float]:
    """Returns shift and scale that give latents of drawn landscapes mean 0 and variance 1 over all features."""
    deviations = torch.tensor(_DEVIATIONS)
    wanted = (deviations / deviations[0]) ** (1 - _EVENNESS)
    return 0.0, float(1 / wanted.square().mean().sqrt())


def encode(pictures: Tensor) -> Tensor:
    """Returns the latents `(B, 16, h / 4, w / 4)` of pictures `(B, 3, h, w)` in [-1, 1], before scale and shift."""
    return nn.functional.conv2d(pictures, patch_features(), stride=PATCH)


def encode_tokens(pictures: Tensor) -> Tensor:
    """Returns the transformer's tokens `(B, h * w / 64, 64)` of pictures `(B, 3, h, w)`, packed as diffusers does."""
    shift, scale = latent_statistics()
    latents = (encode(pictures) - shift) * scale
    batch, channels, rows, columns = latents.shape
    cells = latents.view(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, rows * columns // 4, channels * 4)


def measure_deviations(pictures: Tensor) -> tuple[list[float], list[float]]:
    """Returns means and standard deviations of the unscaled features over pictures `(B, 3, h, w)` in [-1, 1]."""
    features = nn.functional.conv2d(pictures, _plain_features(), stride=PATCH)
    return features.mean(dim=(0, 2, 3)).tolist(), features.std(dim=(0, 2, 3)).tolist()
