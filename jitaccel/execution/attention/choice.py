"""Attention of packed execution: documents of different length in one sequence, each attending to itself alone.

Five backends, in the order of preference. A package is looked for without importing it; only the one that is chosen is
imported, and where that fails, "auto" goes on to the next.

    flash_attn_3   FlashAttention 3, built from source (`flash_attn_interface`) or forward-only from PyPI (`fa3-fwd`)
    flash_attn     FlashAttention 2
    torch_varlen   `torch.nn.attention.varlen`, FlashAttention 2 as torch ships it
    xformers       the only one for float32, or on devices before compute capability 8.0, that is one kernel
    sdpa           torch's scaled dot product attention: one call where the documents are equally long, else one each
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import get_args

import torch
from torch import Tensor

from ...errors import ConfigError, suggestion
from ..options import Attention
from ..packing import PackedLayout
from .backend import Backend as Backend  # as callers know it
from .backend import dtype_name
from .flash import FLASH_ATTN, FLASH_ATTN_3
from .sdpa import SDPA
from .torch_varlen import TORCH_VARLEN
from .xformers import XFORMERS

ATTENTION: tuple[Attention, ...] = get_args(Attention)
BACKENDS = (FLASH_ATTN_3, FLASH_ATTN, TORCH_VARLEN, XFORMERS, SDPA)  # in the order in which "auto" tries them

_LOG = logging.getLogger(__name__)


def check_attention(name: str) -> None:
    """Raises ConfigError, with the name that may have been meant, unless `name` is in ATTENTION."""
    if name not in ATTENTION:
        raise ConfigError(
            f"apply: attention must be one of {', '.join(ATTENTION)}, got {name!r}; {suggestion(name, ATTENTION)}"
        )


@lru_cache(maxsize=64)
def choose_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """Returns the backend of this name, or the first usable for "auto"; its package imported, ready to run.

    name: one of ATTENTION. device, dtype, head_dim: of the queries, keys and values.

    "auto" passes over a package that is installed but fails to import, and logs that. What was chosen once is kept.
    Raises ConfigError for unknown names, and with every reason where the named backend, or any, cannot be used.
    """
    check_attention(name)
    refused: list[str] = []
    for backend in BACKENDS:
        if name not in ("auto", backend.name):
            continue
        reasons = backend.unsupported_reasons(device, dtype, head_dim)
        if not reasons:
            try:
                return backend.load(dtype)
            except ImportError as error:
                reasons = [str(error)]
                if name == "auto":
                    _LOG.warning("attention %s is passed over: %s", backend.name, error)
        refused += reasons if name != "auto" else [f"{backend.name}: {'; '.join(reasons)}"]
    remedy = 'use attention="auto"' if name != "auto" else "use another device or dtype"
    lines = "".join(f"\n  {reason}" for reason in refused)
    raise ConfigError(
        f"apply: attention must be usable for {dtype_name(dtype)} with head dim {head_dim} on {device}, got {name!r}; "
        f"{remedy}, or mend every reason against it:{lines}"
    )


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, backend: Backend) -> Tensor:
    """Returns softmax(q k^T / sqrt(head_dim)) v of each document alone, without causal mask: (T, H, head_dim).

    q, k, v: documents one after the other, (T, H, head_dim), in a dtype and on a device that `backend` was chosen for.
    layout: how long each document is. It gives compilers plain numbers, so that they compile once for each layout.
    backend: as `choose_backend` returns it.

    Raises ValueError where shapes differ from each other or from the layout: kernels would read beyond the end.
    """
    num_tokens = sum(layout.lengths)
    if q.dim() != 3 or q.shape[0] != num_tokens or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"varlen_attention: q, k and v must be ({num_tokens}, heads, head_dim) for this layout, got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; pass all documents, packed"
        )
    return backend.run(q, k, v, layout)
