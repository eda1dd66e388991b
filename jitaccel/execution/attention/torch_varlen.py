"""FlashAttention 2 as torch ships it, `torch.nn.attention.varlen`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..packing import PackedLayout
from .backend import AMPERE, Attend, Backend, KernelPackage


def _load(module: str) -> Attend:
    if not torch.backends.cuda.is_flash_attention_available():
        raise ImportError("this torch is built without FlashAttention")
    return partial(_attend, importlib.import_module(module).varlen_attn)


def _attend(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    # Only these seven positional arguments are the same in all versions from torch 2.10 on. The defaults of the others
    # make it non-causal.
    return function(q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen)


_FLASH = {torch.float16: AMPERE, torch.bfloat16: AMPERE}

TORCH_VARLEN = Backend(
    name="torch_varlen",
    packages=(
        KernelPackage(
            module="torch.nn.attention.varlen",
            package="torch 2.10 or newer",
            load=_load,
            takes=_FLASH,
        ),
    ),
)
