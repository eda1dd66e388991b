"""FlashAttention 3 and 2, from their own packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..packing import PackedLayout
from .backend import AMPERE, Attend, Backend, Capabilities, KernelPackage


def _load(module: str) -> Attend:
    return partial(_attend, importlib.import_module(module).flash_attn_varlen_func)


def _attend(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    # Versions agree on the names of these arguments, but not on their order.
    out = function(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=layout.cu_seqlens,
        cu_seqlens_k=layout.cu_seqlens,
        max_seqlen_q=layout.max_seqlen,
        max_seqlen_k=layout.max_seqlen,
        softmax_scale=q.shape[-1] ** -0.5,
        causal=False,
    )
    return out[0] if isinstance(out, tuple) else out  # early FlashAttention 3 always returns log-sum-exp too


_HOPPER: Capabilities = ((9, 0), (9, 0))
_FLASH = {torch.float16: AMPERE, torch.bfloat16: AMPERE}
_FLASH_3 = {torch.float16: _HOPPER, torch.bfloat16: _HOPPER}

FLASH_ATTN_3 = Backend(
    name="flash_attn_3",
    packages=(
        KernelPackage(module="flash_attn_interface", package="flash-attn-3", load=_load, takes=_FLASH_3),
        # The wheel on PyPI is built without float16.
        KernelPackage(module="fa3_fwd_interface", package="fa3-fwd", load=_load, takes={torch.bfloat16: _HOPPER}),
    ),
)
FLASH_ATTN = Backend(
    name="flash_attn",
    packages=(KernelPackage(module="flash_attn", package="flash-attn", load=_load, takes=_FLASH),),
)
