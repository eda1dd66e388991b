"""Sound that a pipeline makes together with its frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Sound:
    """Sound of one video.

    Attributes:
        samples: (channels, samples), floats in [-1, 1]; of a pipeline that is asked for latents, those of the sound.
        rate: Samples a second, in hertz.
    """

    samples: Any
    rate: int
