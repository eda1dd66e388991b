"""Requests to a server: JSON, checked against its limits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jitaccel import ConfigError, Request
from jitaccel.serving.limits import Limits, RefusedError, request_of

LIMITS = Limits(pixels=512 * 512, steps=20, characters=10, body_bytes=500)


def asked(body: Any, **defaults: Any) -> Request:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request_of(raw, LIMITS, {"height": 256, "width": 256, **defaults})


def test_fields_are_those_of_a_request_and_may_be_left_out() -> None:
    assert asked({"prompt": "a"}) == Request(prompt="a", height=256, width=256)
    assert asked({"prompt": "a", "seed": 3, "width": 128, "preset": "4x"}, preset="10x", seed=1) == Request(
        prompt="a", seed=3, height=256, width=128, preset="4x"
    )


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "the body must be JSON"),
        (b"\xff\xfe", 400, "the body must be JSON"),
        (b"[" * 490, 400, "the body must be JSON"),
        ([], 400, "must be a JSON object, got list"),
        ({}, 400, "prompt must be given"),
        ({"prompt": 3}, 400, "prompt must be one text, got 3"),
        ({"prompt": "a", "sed": 1}, 400, 'got \'sed\'; did you mean "seed"?'),
        ({"prompt": "a", "seed": -1}, 400, "seed must be a whole number"),
        ({"prompt": "a", "seed": 1.5}, 400, "seed must be a whole number"),
        ({"prompt": "a", "height": "big"}, 400, "height must be a whole number"),
        ({"prompt": "a", "height": 1040}, 400, "at most 262144 pixels, got 1040x256"),
        ({"prompt": "a", "preset": "8x"}, 400, "preset must be one of"),
        ({"prompt": "a", "preset": {"steps": 3}}, 400, "preset must be one of"),
        ({"prompt": "a", "steps": 21}, 400, "steps must be at most 20, got 21"),
        ({"prompt": "a", "preset": "dense"}, 400, "steps must be at most 20, got 50"),
        ({"prompt": "a", "steps": True}, 400, "steps must be a whole number, got True"),
        ({"prompt": "a", "steps": 0}, 400, "steps must"),
        ({"prompt": "a" * 11}, 400, "prompt must have at most 10 characters, got 11"),
        ({"prompt": "a", "negative_prompt": "a" * 11}, 400, "negative_prompt must have at most 10 characters"),
        ({"prompt": "a", "guidance_scale": 1e999}, 400, "guidance_scale must be a finite number"),
        ({"prompt": "a", "height": None}, 400, "height and width must be numbers of pixels, got None and 256"),
        ({"prompt": "a", "options": {"num_images_per_prompt": 9}}, 400, "fields must be known, got 'options'"),
        (b" " * 501, 413, "at most 500 bytes, got 501"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(body: Any, status: int, says: str) -> None:
    with pytest.raises(RefusedError) as raised:
        asked(body)
    assert raised.value.status == status and says in raised.value.reason


def test_every_reason_is_named() -> None:
    with pytest.raises(RefusedError) as raised:
        asked({"prompt": "a" * 11, "steps": 30, "height": 2048})
    assert len(raised.value.reason.splitlines()) == 3


def test_limits_are_above_zero() -> None:
    with pytest.raises(ConfigError, match="steps must be above 0, got 0; leave it out for 100"):
        Limits(steps=0)
