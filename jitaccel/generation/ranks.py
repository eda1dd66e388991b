"""Ranks: processes that make one picture together. They agree on their starting point before the first forward.

Each rank holds the whole state and makes every decision of the method itself; only the work inside the network is
divided. So ranks that start with the same state stay the same bit for bit, and need no further exchange.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from ..errors import ConfigError

Made = TypeVar("Made")

_REFUSED = 0  # sent by a rank that cannot begin


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that divide the tokens of each forward. group: their torch.distributed group; None if alone."""

    size: int = 1
    group: Any = None


ALONE = Ranks()


def eight_bytes(*values: object) -> int:
    """Returns a number from 1 to 2^63 - 1 that is almost certainly different for values with a different `repr`."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return max(int.from_bytes(digest) & (2**63 - 1), 1)


def begun_alike(ranks: Ranks, device: torch.device, begin: Callable[[], Made], number: Callable[[Made], int]) -> Made:
    """Returns what `begin` makes, once every rank has made one with the same number. Exchanges eight bytes.

    A rank that fails informs the others, so that they do not wait for it.

    Args:
        ranks: The processes.
        device: Device of the exchange, one that the group can send from.
        begin: Makes the object.
        number: Returns the number of the object to compare.

    Raises:
        ConfigError: On every rank, if the numbers differ.
        RuntimeError: On the other ranks, if one fails; that one raises its own error.
    """
    if ranks.group is None:
        return begin()
    try:
        made = begin()
        own = number(made)
    except Exception:
        _exchanged(ranks, _REFUSED, device)
        raise
    numbers = _exchanged(ranks, own, device)
    if refused := [rank for rank, each in enumerate(numbers) if each == _REFUSED]:
        raise RuntimeError(
            f"jitaccel: every rank must begin the generation, got an error on {_named(refused)}; see its message there"
        )
    if others := [rank for rank, each in enumerate(numbers) if each != numbers[0]]:
        raise ConfigError(
            f"jitaccel: ranks must start from the same noise, with the same settings, size and length of prompts, got "
            f"others on {_named(others)} than on rank 0; give every rank a generator of the same seed, and the same "
            f"call and configuration"
        )
    return made


def _exchanged(ranks: Ranks, number: int, device: torch.device) -> list[int]:
    own = torch.tensor([number], dtype=torch.int64, device=device)
    found = [torch.empty_like(own) for _ in range(ranks.size)]
    distributed.all_gather(found, own, group=ranks.group)
    return [int(each) for each in torch.cat(found).tolist()]


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
