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

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...errors import ConfigError, nearest_match
from ..options import Attention
from ..packing import PackedLayout

Attend = Callable[[Tensor, Tensor, Tensor, PackedLayout], Tensor]
Capabilities = tuple[tuple[int, int], tuple[int, int]]

ATTENTION: tuple[Attention, ...] = get_args(Attention)

_LOG = logging.getLogger(__name__)
_NEWEST = (99, 0)


def _unloaded(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    raise RuntimeError(
        "varlen_attention: backend must be loaded, got one out of BACKENDS; take it from choose_backend, or load it"
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """One package that holds a backend's kernel.

    module: found without importing it. package: what to install. load: imports the module of this name and returns the
    attention. takes: the dtypes, and of each the first and last compute capability that it runs on.
    """

    module: str
    package: str
    load: Callable[[str], Attend]
    takes: Mapping[torch.dtype, Capabilities]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to attend. `run(q, k, v, layout)` is there after `load`; `choose_backend` returns loaded ones.

    sources: the packages that have it; the first that takes the dtype and can be imported is used.
    max_head_dim: also says that head dims are multiples of 8; None takes any.
    """

    name: Attention
    sources: tuple[Source, ...] = field(repr=False)
    needs_cuda: bool = True
    max_head_dim: int | None = 256
    run: Attend = field(default=_unloaded, repr=False)

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
        """Returns every reason why such tensors cannot go through it; nothing where they can.

        Imports no package, and starts no CUDA where there is none.
        """
        reasons = []
        found = [source for source in self.sources if is_found(source.module)]
        if not found:
            reasons.append(f"{' or '.join(source.package for source in self.sources)} is not installed")
        takes = {each: limits for source in reversed(found or self.sources) for each, limits in source.takes.items()}
        if self.needs_cuda:
            reasons += _device_reasons(device, dtype, takes)
        if dtype not in takes:
            reasons.append(f"takes {' or '.join(map(_name, takes))}, got {_name(dtype)}")
        if self.max_head_dim is not None and (head_dim % 8 or not 0 < head_dim <= self.max_head_dim):
            reasons.append(f"takes head dims up to {self.max_head_dim} that are multiples of 8, got {head_dim}")
        return reasons

    def load(self, dtype: torch.dtype) -> Backend:
        """Returns this backend with its package imported, ready to run.

        Raises ImportError with what importing said, whatever it raised, where no package that takes the dtype imports.
        """
        failures = []
        for source in self.sources:
            if dtype not in source.takes or not is_found(source.module):
                continue
            try:
                return replace(self, run=source.load(source.module))
            except Exception as error:  # a package built for another torch or CUDA may raise anything
                said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                failures.append(f"{source.package} is installed but fails to import ({said})")
        raise ImportError("; ".join(failures) or f"nothing that is installed has {self.name} for {_name(dtype)}")


def _device_reasons(device: torch.device, dtype: torch.dtype, takes: Mapping[torch.dtype, Capabilities]) -> list[str]:
    if not torch.cuda.is_available():
        return ["no CUDA device"]
    if device.type != "cuda":
        return [f"needs a CUDA device, got {device}"]
    everything = min(first for first, _ in takes.values()), max(last for _, last in takes.values())
    first, last = takes.get(dtype, everything)
    found = torch.cuda.get_device_capability(device)
    if first <= found <= last:
        return []
    allowed = _dotted(first)
    if first != last:
        allowed += " or newer" if last == _NEWEST else f" to {_dotted(last)}"
    return [f"needs compute capability {allowed} for {_name(dtype)}, got {_dotted(found)}"]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_found(module: str) -> bool:
    """Returns whether a module could be imported; imports at most the packages that hold it, of torch alone.

    A folder without `__init__.py` does not count: flash-attn-4 leaves such a `flash_attn`, without FlashAttention 2.
    """
    wanted = module if module.startswith("torch.") else module.partition(".")[0]
    if sys.modules.get(wanted) is not None:
        return True
    try:
        spec = importlib.util.find_spec(wanted)
    except ImportError:  # what should hold the module is missing
        return False
    return spec is not None and spec.origin is not None


def check_attention(name: str) -> None:
    """Raises ConfigError with the nearest match unless `name` is in ATTENTION."""
    if name not in ATTENTION:
        raise ConfigError(
            f"apply: attention must be one of {', '.join(ATTENTION)}, got {name!r}; "
            f'did you mean "{nearest_match(name, ATTENTION)}"?'
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
        f"apply: attention must be usable for {_name(dtype)} with head dim {head_dim} on {device}, got {name!r}; "
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


def _load_flash(module: str) -> Attend:
    return partial(_flash, importlib.import_module(module).flash_attn_varlen_func)


def _flash(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    # Versions agree on the names of these arguments and not on their order.
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


def _load_torch_varlen(module: str) -> Attend:
    if not torch.backends.cuda.is_flash_attention_available():
        raise ImportError("this torch is built without FlashAttention")
    return partial(_torch_varlen, importlib.import_module(module).varlen_attn)


def _torch_varlen(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    # These seven by place are all that is the same from torch 2.10 on; without others it is not causal.
    return function(q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen)


def _load_xformers(module: str) -> Attend:
    ops = importlib.import_module(module)
    masks: WeakKeyDictionary[PackedLayout, Any] = WeakKeyDictionary()  # making a mask copies to the device
    return partial(_xformers, ops.memory_efficient_attention, ops.fmha.BlockDiagonalMask, masks)


def _xformers(
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


def _load_sdpa(module: str) -> Attend:
    return _sdpa


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    lengths = layout.lengths
    if len(set(lengths)) == 1:
        q, k, v = (x.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_one_document(*part) for part in parts])


def _one_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # fused kernels take four dimensions only
    return scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


_ANY: Capabilities = ((0, 0), _NEWEST)
_AMPERE: Capabilities = ((8, 0), _NEWEST)
_HOPPER: Capabilities = ((9, 0), (9, 0))
_FLASH = {torch.float16: _AMPERE, torch.bfloat16: _AMPERE}
_FLASH_3 = {torch.float16: _HOPPER, torch.bfloat16: _HOPPER}
# xFormers' CUTLASS kernel ends at 9.0; beyond, half precision goes through FlashAttention alone.
_XFORMERS = {torch.float32: ((7, 5), (9, 0)), torch.float16: ((7, 5), _NEWEST), torch.bfloat16: _AMPERE}
_SDPA = dict.fromkeys((torch.float64, torch.float32, torch.float16, torch.bfloat16), _ANY)

BACKENDS: tuple[Backend, ...] = (  # in the order in which "auto" tries them
    Backend(
        name="flash_attn_3",
        sources=(
            Source(module="flash_attn_interface", package="flash-attn-3", load=_load_flash, takes=_FLASH_3),
            # The wheel on PyPI is built without float16.
            Source(module="fa3_fwd_interface", package="fa3-fwd", load=_load_flash, takes={torch.bfloat16: _HOPPER}),
        ),
    ),
    Backend(
        name="flash_attn",
        sources=(Source(module="flash_attn", package="flash-attn", load=_load_flash, takes=_FLASH),),
    ),
    Backend(
        name="torch_varlen",
        sources=(
            Source(
                module="torch.nn.attention.varlen",
                package="torch 2.10 or newer",
                load=_load_torch_varlen,
                takes=_FLASH,
            ),
        ),
    ),
    Backend(
        name="xformers",
        sources=(Source(module="xformers.ops", package="xformers", load=_load_xformers, takes=_XFORMERS),),
    ),
    Backend(
        name="sdpa",
        sources=(Source(module="torch", package="torch", load=_load_sdpa, takes=_SDPA),),
        needs_cuda=False,
        max_head_dim=None,
    ),
)
