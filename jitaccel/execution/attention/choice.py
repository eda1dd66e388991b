"""Attention of packed execution: documents of different length in one sequence, each attending only to itself.

There are five backends, here in order of preference. Packages are located without being imported. Only the chosen one
is imported; if that fails, "auto" tries the next.

    flash_attn_3   FlashAttention 3, built from source (`flash_attn_interface`) or forward-only from PyPI (`fa3-fwd`)
    flash_attn     FlashAttention 2
    torch_varlen   `torch.nn.attention.varlen`, FlashAttention 2 as torch ships it
    xformers       the only single-kernel backend for float32, and for devices before compute capability 8.0
    sdpa           torch's scaled dot product attention: one call if documents have equal length, else one per document
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
from .backend import Backend as Backend  # re-exported for callers
from .backend import dtype_name
from .flash import FLASH_ATTN, FLASH_ATTN_3
from .sdpa import SDPA
from .torch_varlen import TORCH_VARLEN
from .xformers import XFORMERS

ATTENTION: tuple[Attention, ...] = get_args(Attention)
BACKENDS = (FLASH_ATTN_3, FLASH_ATTN, TORCH_VARLEN, XFORMERS, SDPA)  # in the order in which "auto" tries them

_LOG = logging.getLogger(__name__)


def check_attention(name: str) -> None:
    """Raises ConfigError, suggesting a similar name, unless `name` is in ATTENTION."""
    if name not in ATTENTION:
        raise ConfigError(
            f"apply: attention must be one of {', '.join(ATTENTION)}, got {name!r}; {suggestion(name, ATTENTION)}"
        )


@lru_cache(maxsize=64)
def choose_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """Returns the named backend, or for "auto" the first usable one, with its package imported and ready to run.

    "auto" skips a package that is installed but fails to import, and logs that. The choice is cached.

    Args:
        name: One of ATTENTION.
        device: Device of the queries, keys and values.
        dtype: Their dtype.
        head_dim: Their head dim.

    Raises:
        ConfigError: For an unknown name, or if the named backend (or every backend) cannot be used; lists all reasons.
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
                    _LOG.warning("attention %s is skipped: %s", backend.name, error)
        refused += reasons if name != "auto" else [f"{backend.name}: {'; '.join(reasons)}"]
    remedy = 'use attention="auto"' if name != "auto" else "use another device or dtype"
    lines = "".join(f"\n  {reason}" for reason in refused)
    raise ConfigError(
        f"apply: attention must be usable for {dtype_name(dtype)} with head dim {head_dim} on {device}, got {name!r}; "
        f"{remedy}, or resolve these reasons:{lines}"
    )


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, backend: Backend) -> Tensor:
    """Returns softmax(q k^T / sqrt(head_dim)) v of each document alone, without causal mask: (T, H, head_dim).

    Args:
        q: (T, H, head_dim), documents one after the other, in a dtype and on a device that `backend` was chosen for.
        k: As `q`.
        v: As `q`.
        layout: The lengths of the documents, as plain numbers, so that compilers compile once per layout.
        backend: As `choose_backend` returns it.

    Raises:
        ValueError: If shapes differ from each other or from the layout; kernels would read out of bounds.
    """
    num_tokens = sum(layout.lengths)
    if q.dim() != 3 or q.shape[0] != num_tokens or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"varlen_attention: q, k and v must be ({num_tokens}, heads, head_dim) for this layout, got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; pass all documents, packed"
        )
    return backend.run(q, k, v, layout)
