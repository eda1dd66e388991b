"""Processes that make one picture together: ranks, which agree on what they start from before the first forward.

Each rank owns the whole state and makes every decision of the method itself; only the network's inside is divided. So
ranks that start alike stay alike, bit for bit, and nothing else has to be exchanged.
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

_REFUSED = 0  # what a rank says that cannot begin


@dataclass(frozen=True, eq=False)
class Ranks:
    """Who divides the tokens of each forward. group: their process group of torch.distributed; None for one process."""

    size: int = 1
    group: Any = None


ALONE = Ranks()


def eight_bytes(*values: object) -> int:
    """Returns a number from 1 to 2^63 - 1 that other values, told apart by their `repr`, would hardly give."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return max(int.from_bytes(digest) & (2**63 - 1), 1)


def begun_alike(ranks: Ranks, device: torch.device, begin: Callable[[], Made], number: Callable[[Made], int]) -> Made:
    """Returns what `begin` makes, once every rank has made one of the same number; one exchange of eight bytes.

    A rank that fails tells the others, so that none waits for it.

    device: where the exchange takes place, one that the group can send from.
    Raises ConfigError on every rank where numbers differ; where one fails, its error there and RuntimeError elsewhere.
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
            f"jitaccel: every rank must begin the generation, got an error on {_named(refused)}; read it there"
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
