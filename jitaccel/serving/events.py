"""The events of a request in a replica: steps, and at the end a picture or an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """The number of steps done, and the total."""

    step: int
    steps: int


@dataclass(frozen=True)
class FinishedPicture:
    """A picture as PNG, and its cost."""

    png: bytes
    statistics: Mapping[str, Any]


@dataclass(frozen=True)
class Failed:
    """The reason why there is no picture. status: HTTP status, 400 if the request is at fault."""

    status: int
    reason: str


Event = Progress | FinishedPicture | Failed
