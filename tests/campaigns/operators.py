"""Operators with odd shapes and absurd numbers match the plain-torch reference or raise an error that names them."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from jitaccel import ops
from tests.campaigns.campaign import Counts, Survivor
from tests.support.operators import ARGUMENTS, call, compiled, fields, plain

_ABSURD = (-1, 0, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))


def case(rng: random.Random, counts: Counts) -> None:
    """Calls one operator with an odd shape, or with an absurd value for an argument."""
    name = rng.choice([*ARGUMENTS])
    grid = rng.choice(
        ((rng.randint(1, 19), rng.randint(1, 19)), (rng.randint(1, 4), rng.randint(1, 9), rng.randint(1, 9)))
    )
    count = rng.randint(1, max(1, torch.Size(grid).numel()))
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    given = fields(grid, count, rng.randint(1, 9), rng.randint(0, 3), dtype, rng.randrange(2**31))
    arguments = ARGUMENTS[name](given)
    counts.operations += 1
    if rng.random() < 0.5:
        counts.faults += 1
        _absurd(rng, name, arguments)
        return
    wide = ARGUMENTS[name](given.double())
    expected, found = call(plain(name), name, wide), call(compiled(name), name, arguments)
    own = call(plain(name), name, ARGUMENTS[name](given))
    if found.shape != expected.shape or _error(found, expected) > 2.0 * _error(own, expected) + _rounding(
        dtype, expected
    ):
        raise Survivor(
            f"{name} of {grid}, {count} anchors, {dtype}: off by {_error(found, expected):g}, plain torch by "
            f"{_error(own, expected):g}"
        )


def _absurd(rng: random.Random, name: str, arguments: tuple[Any, ...]) -> None:
    place = rng.randrange(len(arguments))
    changed = (*arguments[:place], _spoilt(rng, arguments[place]), *arguments[place + 1 :])
    for function in (getattr(ops, name), compiled(name)):
        mine = tuple(x.clone() if isinstance(x, Tensor) else x for x in changed)
        try:
            call(function, name, mine)
        except (ValueError, RuntimeError, TypeError, IndexError, OverflowError, NotImplementedError) as error:
            is_named = name in str(error) or "jitaccel::" in str(error) or "lift" in str(error)
            if function is not compiled(name) and isinstance(error, ValueError) and not is_named:
                raise Survivor(f"{name}, argument {place}: {error} names no operator") from error


def _spoilt(rng: random.Random, value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_floating_point():
        spoilt = value.clone()
        if spoilt.numel():
            spoilt.view(-1)[rng.randrange(spoilt.numel())] = rng.choice(_ABSURD)
        return rng.choice(
            (spoilt, value[..., :-1], value[:0], value.int(), value.double(), value[0] if len(value) else value)
        )
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return rng.choice((value.double(), value[None], value * float("nan")))
        return rng.choice(
            (
                value[..., :-1],
                value[:0],
                value.double(),
                value.transpose(0, -1),
                value.long(),
                value[0] if len(value) else value,
            )
        )
    if isinstance(value, tuple):
        sides = [*value]
        sides[rng.randrange(len(sides))] = rng.choice(_ABSURD)
        return rng.choice((tuple(sides), (), (1,), (2**40, 2**40), (2**32, 2**31), value * 2))
    if isinstance(value, float):
        return rng.choice((float("nan"), float("inf"), -1.0, 2.0, 1e308))
    return rng.choice(_ABSURD)


def _error(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected.double()).abs().max()) if x.numel() else 0.0


def _rounding(dtype: torch.dtype, like: Tensor) -> float:
    """Returns the tolerance for sums of a few hundred rounded terms."""
    scale = float(like.double().abs().max()) if like.numel() else 0.0
    return 32.0 * torch.finfo(dtype).eps * max(1.0, scale)
