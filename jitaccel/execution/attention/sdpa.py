"""torch's scaled dot product attention: one call if documents have equal length, else one per document."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..packing import PackedLayout
from .backend import NEWEST, Attend, Backend, Capabilities, KernelPackage


def _load(module: str) -> Attend:
    return _attend


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    lengths = layout.lengths
    if len(set(lengths)) == 1:
        q, k, v = (x.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_one_document(*part) for part in parts])


def _one_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # fused kernels need four dimensions
    return scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


_ANY: Capabilities = ((0, 0), NEWEST)
_TAKES = dict.fromkeys((torch.float64, torch.float32, torch.float16, torch.bfloat16), _ANY)

SDPA = Backend(
    name="sdpa",
    packages=(KernelPackage(module="torch", package="torch", load=_load, takes=_TAKES),),
    needs_cuda=False,
    max_head_dim=None,
)
