"""Encodes pictures as data URIs, with the best size and quality that a total limit allows."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError
from .playback import FrameBytes

if TYPE_CHECKING:
    from PIL import Image

_SAMPLED = 12  # pictures that are encoded to estimate the total size
_TALLEST_PX = 16000  # of a strip of frames; WebP's limit is 16383


@dataclass(frozen=True)
class _Rung:
    """One encoding: the longest side of a step's picture, that of the finished one, and WebP's quality."""

    side_px: int
    final_px: int
    quality: int


_LADDER = (
    _Rung(512, 1024, 84),
    _Rung(448, 1024, 80),
    _Rung(384, 768, 76),
    _Rung(320, 640, 72),
    _Rung(256, 512, 70),
    _Rung(224, 512, 62),
    _Rung(192, 384, 56),
    _Rung(160, 320, 50),
    _Rung(128, 256, 45),
    _Rung(96, 192, 40),
    _Rung(64, 128, 35),
)


def encoded(pictures: Sequence[FrameBytes], is_final: Sequence[bool], limit: int) -> list[str]:
    """Returns a data URI of each picture, in the best quality in which all fit.

    The frames of a video are stacked vertically in one picture.

    Args:
        pictures: (frames, h, w, 3) each.
        is_final: Which of them are finished pictures, which are kept larger.
        limit: Total size of all URIs in bytes.

    Raises:
        ConfigError: If they do not fit even in the worst quality, or if Pillow is missing.
    """
    _require_pillow()
    pairs = list(zip(pictures, is_final, strict=True))
    sample = pairs[:: max(1, len(pairs) // _SAMPLED)]
    for rung in _LADDER:
        guess = sum(len(_uri(picture, rung, final)) for picture, final in sample) * len(pairs) / len(sample)
        if guess > 1.1 * limit:
            continue
        uris = [_uri(picture, rung, final) for picture, final in pairs]
        if sum(map(len, uris)) <= limit:
            return uris
    raise ConfigError(
        f"write_report: pictures must fit in {limit} bytes, got {len(pairs)} that do not; "
        f"show fewer generations, or fewer frames with playback(frames=...)"
    )


def _uri(picture: FrameBytes, rung: _Rung, is_final: bool) -> str:
    from PIL import Image

    frames, height, width = picture.shape[:3]
    longest = rung.final_px if is_final else rung.side_px
    scale = min(1.0, longest / max(height, width), _TALLEST_PX / (frames * height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    strip = [_resized(Image.fromarray(frame), size) for frame in picture]
    image = Image.fromarray(np.concatenate([np.asarray(frame) for frame in strip]))
    data = io.BytesIO()
    image.save(data, "WEBP", quality=rung.quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _require_pillow() -> None:
    try:
        from PIL import features
    except ImportError:
        raise ConfigError(
            'write_report: Pillow must be installed to write pictures, got none; pip install "jitaccel[diffusers]"'
        ) from None
    if not features.check("webp"):
        raise ConfigError("write_report: Pillow must write WebP, got one built without; pip install --upgrade pillow")
