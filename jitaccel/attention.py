"""Attention backends, and why each is or is not usable here. Nothing is imported to find out but what torch has.

Today every model runs with the attention that its own codebase chose (`indexed` execution). Packed execution will
choose among these.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What one backend needs.

    module: found without importing it. package: what to install. dtypes: all that it takes. capability,
    last_capability: the first and last compute capability of CUDA that it runs on.
    """

    name: str
    module: str
    package: str
    dtypes: tuple[torch.dtype, ...]
    needs_cuda: bool = True
    capability: tuple[int, int] = (0, 0)
    last_capability: tuple[int, int] = (99, 0)

    def reasons_unusable(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        """Returns every reason why tensors of this device and dtype cannot go through it; nothing where they can."""
        reasons = []
        if not is_found(self.module):
            reasons.append(f"{self.package} is not installed")
        if self.needs_cuda and device.type != "cuda":
            reasons.append("no CUDA device" if not torch.cuda.is_available() else f"{device} is no CUDA device")
        elif self.needs_cuda:
            found = torch.cuda.get_device_capability(device)
            if not self.capability <= found <= self.last_capability:
                reasons.append(f"needs compute capability {_range(self.capability, self.last_capability)}, got {found}")
        if dtype not in self.dtypes:
            names = " or ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"takes {names}, got {str(dtype).removeprefix('torch.')}")
        return reasons


def _range(first: tuple[int, int], last: tuple[int, int]) -> str:
    lowest = ".".join(map(str, first))
    return f"{lowest} and above" if last[0] == 99 else f"{lowest} to {'.'.join(map(str, last))}"


def is_found(module: str) -> bool:
    """Returns whether a module could be imported; imports at most the packages that hold it, of torch alone."""
    top = module.split(".")[0]
    if importlib.util.find_spec(top) is None:
        return False
    return top != "torch" or importlib.util.find_spec(module) is not None


BACKENDS: tuple[Backend, ...] = (
    Backend(name="torch sdpa", module="torch", package="torch", dtypes=(torch.float32, *_HALF), needs_cuda=False),
    Backend(
        name="torch varlen",
        module="torch.nn.attention.varlen",
        package="torch 2.10 or newer",
        dtypes=_HALF,
        capability=(8, 0),
    ),
    Backend(name="flash-attn 2", module="flash_attn", package="flash-attn", dtypes=_HALF, capability=(8, 0)),
    Backend(
        name="flash-attn 3",
        module="flash_attn_interface",
        package="flash_attn_interface",
        dtypes=_HALF,
        capability=(9, 0),
        last_capability=(9, 0),
    ),
    Backend(
        name="xformers",
        module="xformers",
        package="xformers",
        dtypes=(torch.float32, *_HALF),
        capability=(7, 5),
    ),
)
