"""Alternatives that users might install instead, as words of `jitaccel eval --methods`: caches of network outputs.

They run on the pipeline's own levels, as their users run them, and one image at a time: a cache makes one decision per
batch, and an image must not depend on the others next to it. The cost counts only operations that ran (`work.counted`).
"""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..errors import CommandError
from ..loading import require_diffusers
from ..method.checks import MAX_STEPS
from .comparison import Rival
from .half import HalfFirst
from .one_by_one import CachedRun


@dataclass(frozen=True, kw_only=True)
class FirstBlock(CachedRun):
    """diffusers' FirstBlockCache, after ParaAttention's (github.com/chengzeyi/ParaAttention).

    Every step runs the first block. If the block's residual for the image tokens has changed since the last full step
    by a relative mean of at most `threshold`, the residual of all other blocks is reused.
    """

    threshold: float

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "rival": "firstblock", "steps": self.steps, "threshold": self.threshold, "package": _package("diffusers"),
        }  # fmt: skip

    def installed(self, pipe: Any) -> AbstractContextManager[None]:
        import diffusers

        return _diffusers_cache(pipe, diffusers.FirstBlockCacheConfig(threshold=self.threshold))


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(CachedRun):
    """diffusers' TaylorSeerCache (arXiv:2503.06923), first order with float32 factors, as in its documentation.

    The first three steps are full; after them every `interval`-th, beginning with the second. The others extrapolate.
    By diffusers' default, only the outputs of attention are extrapolated, and everything else runs. `is_lite`, its lite
    mode, extrapolates the network's last layer and skips every block.
    """

    interval: int
    is_lite: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        name = "taylorseer-lite" if self.is_lite else "taylorseer"
        return {"rival": name, "steps": self.steps, "interval": self.interval, "package": _package("diffusers")}

    def installed(self, pipe: Any) -> AbstractContextManager[None]:
        import diffusers
        import torch

        config = diffusers.TaylorSeerCacheConfig(
            cache_interval=self.interval, taylor_factors_dtype=torch.float32, use_lite_mode=self.is_lite
        )
        return _diffusers_cache(pipe, config)


@dataclass(frozen=True, kw_only=True)
class CacheDiT(CachedRun):
    """cache-dit's DBCache (github.com/vipshop/cache-dit), which decides like FirstBlock, but after several blocks.

    Uses its default settings: the first 8 of FLUX.1's 57 blocks always run (in smaller models the same share, at least
    one), and the first 8 steps are full. threshold: of the relative change; None is its default, 0.08.
    """

    threshold: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "rival": "cachedit", "steps": self.steps, "threshold": self.threshold, "package": _package("cache-dit"),
        }  # fmt: skip

    @contextmanager
    def installed(self, pipe: Any) -> Iterator[None]:
        import cache_dit

        blocks = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
        options = {} if self.threshold is None else {"residual_diff_threshold": self.threshold}
        config = cache_dit.DBCacheConfig(Fn_compute_blocks=max(1, 8 * blocks // 57), **options)
        with _quiet("CACHE_DIT"):
            try:
                cache_dit.enable_cache(pipe, cache_config=config)
                yield
            finally:
                cache_dit.disable_cache(pipe)


def find_rival(word: str) -> Rival | None:
    """Returns the rival that a word names, or None if it names none.

    Raises CommandError for invalid numbers, and for a missing package.
    """
    kind, *numbers = word.split(":")
    if kind not in _KINDS:
        return None
    form, rule, make = _KINDS[kind]
    try:
        rival = make(*numbers)
    except (TypeError, ValueError) as error:  # too many, too few, or an invalid one
        raise CommandError(f"--methods must give {form}, {rule}, got {word!r}") from error
    _require(kind)
    return rival


def _whole(text: str, most: int = MAX_STEPS) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= most):
        raise ValueError(text)
    return int(text)


def _threshold(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(text)
    return value


def _first_block(steps: str, threshold: str) -> FirstBlock:
    return FirstBlock(steps=_whole(steps), threshold=_threshold(threshold))


def _taylorseer(steps: str, interval: str) -> TaylorSeer:
    return TaylorSeer(steps=_whole(steps), interval=_whole(interval))


def _taylorseer_lite(steps: str, interval: str) -> TaylorSeer:
    return TaylorSeer(steps=_whole(steps), interval=_whole(interval), is_lite=True)


def _cache_dit(steps: str, threshold: str | None = None) -> CacheDiT:
    return CacheDiT(steps=_whole(steps), threshold=None if threshold is None else _threshold(threshold))


def _half(steps: str, half_steps: str) -> HalfFirst:
    return HalfFirst(steps=_whole(steps), half_steps=_whole(half_steps, most=_whole(steps) - 1))


_WHOLE = "whole numbers from 1 to 10000"
_KINDS: Mapping[str, tuple[str, str, Callable[..., Rival]]] = {
    "firstblock": ("firstblock:STEPS:THRESHOLD", "steps from 1 and a threshold from 0", _first_block),
    "taylorseer": ("taylorseer:STEPS:INTERVAL", _WHOLE, _taylorseer),
    "taylorseer-lite": ("taylorseer-lite:STEPS:INTERVAL", _WHOLE, _taylorseer_lite),
    "cachedit": ("cachedit:STEPS or cachedit:STEPS:THRESHOLD", "steps from 1 and a threshold from 0", _cache_dit),
    "half": ("half:STEPS:HALF_STEPS", "whole numbers from 1, the second below the first", _half),
}
FORMS = tuple(form for form, _, _ in _KINDS.values())
_CONFIGS = {
    "firstblock": "FirstBlockCacheConfig",
    "taylorseer": "TaylorSeerCacheConfig",
    "taylorseer-lite": "TaylorSeerCacheConfig",
}


def _require(kind: str) -> None:
    """Raises CommandError if a rival's package is missing or too old."""
    if kind == "cachedit" and "cache_dit" not in sys.modules and importlib.util.find_spec("cache_dit") is None:
        raise CommandError('cache-dit must be installed for cachedit, got none; pip install "jitaccel[cache-dit]"')
    if kind in _CONFIGS:
        require_diffusers()
        import diffusers

        if not hasattr(diffusers, _CONFIGS[kind]):
            raise CommandError(
                f"{kind} must have a diffusers with {_CONFIGS[kind]}, got {diffusers.__version__}; "
                f"pip install --upgrade diffusers"
            )


def _package(name: str) -> str:
    """Returns a package's name and version, because another version may cache differently."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name


@contextmanager
def _diffusers_cache(pipe: Any, config: Any) -> Iterator[None]:
    pipe.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Silences a logger below errors inside the block: cache-dit logs ten lines to stdout for each image."""
    levels = [(handler, handler.level) for handler in logging.getLogger(logger).handlers]
    for handler, _ in levels:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in levels:
            handler.setLevel(level)
