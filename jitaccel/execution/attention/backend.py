"""Defines a backend of packed attention: the packages that provide it, and the tensors it accepts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..options import Attention
from ..packing import PackedLayout

Attend = Callable[[Tensor, Tensor, Tensor, PackedLayout], Tensor]
"""Attention within each document: queries, keys, values (T, heads, head_dim) and their layout to the same shape."""

Capabilities = tuple[tuple[int, int], tuple[int, int]]

NEWEST = (99, 0)
AMPERE: Capabilities = ((8, 0), NEWEST)


def _unloaded(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    raise RuntimeError(
        "varlen_attention: backend must be loaded, got an entry of BACKENDS; take it from choose_backend, or load it"
    )


@dataclass(frozen=True, kw_only=True)
class KernelPackage:
    """A package that provides a backend's kernel.

    Attributes:
        module: Its module, looked up without importing it.
        package: The package to install.
        load: Imports the module of this name and returns the attention function.
        takes: The supported dtypes, each with the first and last compute capability it runs on.
    """

    module: str
    package: str
    load: Callable[[str], Attend]
    takes: Mapping[torch.dtype, Capabilities]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """An attention implementation. `run(q, k, v, layout)` works after `load`; `choose_backend` returns loaded ones.

    Attributes:
        packages: The packages that provide it; the first that supports the dtype and can be imported is used.
        max_head_dim: Largest head dim; head dims must then also be multiples of 8. None accepts any.
    """

    name: Attention
    packages: tuple[KernelPackage, ...] = field(repr=False)
    needs_cuda: bool = True
    max_head_dim: int | None = 256
    run: Attend = field(default=_unloaded, repr=False)

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
        """Returns every reason why such tensors are not supported; an empty list if they are.

        Imports no package, and does not initialise CUDA on a machine without it.
        """
        reasons = []
        found = [kernel for kernel in self.packages if is_found(kernel.module)]
        if not found:
            reasons.append(f"{' or '.join(kernel.package for kernel in self.packages)} is not installed")
        takes = {each: limits for kernel in reversed(found or self.packages) for each, limits in kernel.takes.items()}
        if self.needs_cuda:
            reasons += _device_reasons(device, dtype, takes)
        if dtype not in takes:
            reasons.append(f"takes {' or '.join(map(dtype_name, takes))}, got {dtype_name(dtype)}")
        if self.max_head_dim is not None and (head_dim % 8 or not 0 < head_dim <= self.max_head_dim):
            reasons.append(f"takes head dims up to {self.max_head_dim} that are multiples of 8, got {head_dim}")
        return reasons

    def load(self, dtype: torch.dtype) -> Backend:
        """Returns this backend with its package imported, ready to run.

        Raises ImportError if no package that supports the dtype can be imported, whatever the import raised.
        """
        failures = []
        for kernel in self.packages:
            if dtype not in kernel.takes or not is_found(kernel.module):
                continue
            try:
                return replace(self, run=kernel.load(kernel.module))
            except Exception as error:  # a package built for another torch or CUDA may raise anything
                said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                failures.append(f"{kernel.package} is installed but fails to import ({said})")
        raise ImportError("; ".join(failures) or f"no installed package has {self.name} for {dtype_name(dtype)}")


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
        allowed += " or newer" if last == NEWEST else f" to {_dotted(last)}"
    return [f"needs compute capability {allowed} for {dtype_name(dtype)}, got {_dotted(found)}"]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_found(module: str) -> bool:
    """Returns whether a module could be imported. Imports at most the packages that contain it, and only torch's.

    A folder without `__init__.py` does not count: flash-attn-4 leaves such a `flash_attn` folder, without
    FlashAttention 2.
    """
    wanted = module if module.startswith("torch.") else module.partition(".")[0]
    if sys.modules.get(wanted) is not None:
        return True
    try:
        spec = importlib.util.find_spec(wanted)
    except ImportError:  # the package that would contain the module is missing
        return False
    return spec is not None and spec.origin is not None
