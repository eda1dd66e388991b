"""xFormers' memory-efficient attention under a block-diagonal mask."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..packing import PackedLayout
from .backend import AMPERE, NEWEST, Attend, Backend, KernelPackage


def _load(module: str) -> Attend:
    ops = importlib.import_module(module)
    masks: WeakKeyDictionary[PackedLayout, Any] = WeakKeyDictionary()  # making a mask copies data to the device
    return partial(_attend, ops.memory_efficient_attention, ops.fmha.BlockDiagonalMask, masks)


def _attend(
    function: Callable[..., Any],
    mask_type: Any,
    masks: WeakKeyDictionary[PackedLayout, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
) -> Tensor:
    mask = masks.get(layout)
    if mask is None:
        mask = masks[layout] = mask_type.from_seqlens(q_seqlen=[*layout.lengths], device=q.device)
    return function(query=q[None], key=k[None], value=v[None], attn_bias=mask)[0]


# xFormers' CUTLASS kernel supports up to 9.0; beyond that, half precision works only through FlashAttention.
_TAKES = {torch.float32: ((7, 5), (9, 0)), torch.float16: ((7, 5), NEWEST), torch.bfloat16: AMPERE}

XFORMERS = Backend(
    name="xformers",
    packages=(KernelPackage(module="xformers.ops", package="xformers", load=_load, takes=_TAKES),),
)
