"""What a replica says of a request on its way: steps, and at the end a picture or an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Steps done, of how many."""

    step: int
    steps: int


@dataclass(frozen=True)
class FinishedPicture:
    """A picture as PNG, and what it cost."""

    png: bytes
    statistics: Mapping[str, Any]


@dataclass(frozen=True)
class Failed:
    """Why there is no picture. status: of HTTP, 400 where the request is at fault."""

    status: int
    reason: str


Event = Progress | FinishedPicture | Failed
