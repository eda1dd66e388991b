"""Checks a request's JSON against the server's limits and turns it into a `jitaccel.Request`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError, suggestion
from ..generation.batch import Request
from ..method.presets import PRESETS

_FIELDS = tuple(field.name for field in fields(Request) if field.name != "options")  # clients cannot set options


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a server.

    Attributes:
        waiting: Accepted requests without an answer; further ones are refused with 429.
        seconds: Time from acceptance to answer; a request that takes longer ends with 504.
        pixels: Height times width of one picture.
        steps: Denoising steps of one picture.
        characters: Length of a prompt, and of a negative prompt.
        body_bytes: Size of a request's body.
        tries: How many replicas a request is passed to, if those that had it end.
    """

    waiting: int = 64
    seconds: float = 300.0
    pixels: int = 2048 * 2048
    steps: int = 100
    characters: int = 4000
    body_bytes: int = 64 * 1024
    tries: int = 2

    def __post_init__(self) -> None:
        if problems := [
            f"Limits: {field.name} must be above 0, got {getattr(self, field.name)!r}; leave it out for {field.default}"
            for field in fields(self)
            if not getattr(self, field.name) > 0
        ]:
            raise ConfigError("\n".join(problems))


class RefusedError(Exception):
    """A request that is answered with an error. `status`: HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


def request_of(body: bytes, limits: Limits, defaults: Mapping[str, Any]) -> Request:
    """Returns the request in a body.

    Args:
        body: A JSON object with the fields of `jitaccel.Request`; presets are given by name.
        limits: The server's limits.
        defaults: Values for missing fields; they replace the defaults of `jitaccel.Request`.

    Raises:
        RefusedError: With 413 for a body that is too long, and with 400 and every problem for one that cannot be run.
    """
    if len(body) > limits.body_bytes:
        raise RefusedError(413, f"the body must have at most {limits.body_bytes} bytes, got {len(body)}")
    asked = _object(body)
    given = {**defaults, **asked}
    if unknown := [name for name in asked if name not in _FIELDS]:
        advice = suggestion(unknown[0], _FIELDS, f"the fields are {', '.join(_FIELDS)}")
        raise RefusedError(400, f"fields must be known, got {', '.join(map(repr, unknown))}; {advice}")
    if "prompt" not in given:
        raise RefusedError(400, 'prompt must be given, got none; send {"prompt": "..."}')
    request = Request(**given)
    if problems := _problems(request, limits):
        raise RefusedError(400, "\n".join(problems))
    return request


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body must be JSON, got an error: {error}") from None
    if not isinstance(found, dict):
        raise RefusedError(400, f"the body must be a JSON object, got {type(found).__name__}")
    return found


def _problems(request: Request, limits: Limits) -> list[str]:
    found = request.problems()
    if not isinstance(request.preset, str):
        found.append(f"preset must be one of {', '.join(PRESETS)}, got {type(request.preset).__name__}")
    if request.steps is not None and (isinstance(request.steps, bool) or not isinstance(request.steps, int)):
        found.append(f"steps must be a whole number, got {request.steps!r}")
    if found:
        return found
    try:
        steps = request.config().steps
    except ConfigError as error:
        return [str(error)]
    if isinstance(steps, int) and steps > limits.steps:
        found.append(f"steps must be at most {limits.steps}, got {steps}")
    if request.height is None or request.width is None:
        found.append(f"height and width must be numbers of pixels, got {request.height} and {request.width}")
    elif request.height * request.width > limits.pixels:
        found.append(f"height times width must be at most {limits.pixels} pixels, got {request.height}x{request.width}")
    for name in ("prompt", "negative_prompt"):
        if len(getattr(request, name) or "") > limits.characters:
            found.append(f"{name} must have at most {limits.characters} characters, got {len(getattr(request, name))}")
    return found
