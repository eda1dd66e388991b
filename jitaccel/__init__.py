"""Training-free spatial acceleration of flow-matching transformers (Just-in-Time, arXiv:2603.10744).

    handle = jitaccel.apply(pipe, preset="7x")

| paper | here | |
|---|---|---|
| t | `noise_level` = 1 - t | 1 is pure noise, 0 is data |
| y | `state` | (B, N, D), every token of the grid |
| u | `velocity` | what the network returns; dy / d(noise_level) |
| Omega_k | `anchors` | the tokens that enter the network, (B, M) |
| I_k, Phi_k | `lift` | from the anchors to every token |
| I | `importance` | local variance of the velocity |
| K .. 0 | `stage` 0, 1, .. | sparsest first |

Importing this package imports neither torch nor diffusers; the names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import apply, embedded_model
    from .artefacts.export import Exported, export, load_exported
    from .errors import ArtefactError, ConfigError, NonFiniteVelocityError, UnsupportedModelError
    from .generation.batch import Outcome, Request, generate_batch
    from .generation.handle import Handle
    from .generation.registry import handle_of, remove
    from .generation.sound import Sound
    from .generation.stats import Stats
    from .method.config import JiTConfig
    from .method.presets import PRESETS
    from .method.schedule import noise_levels
    from .speed.auto import Choice, auto_config
    from .speed.target import Auto
    from .version import __version__ as __version__  # not in __all__: `import *` leaves it out

_HOMES = {
    "apply": "api",
    "embedded_model": "api",
    "Exported": "artefacts.export",
    "export": "artefacts.export",
    "load_exported": "artefacts.export",
    "Auto": "speed.target",
    "Choice": "speed.auto",
    "auto_config": "speed.auto",
    "Outcome": "generation.batch",
    "Request": "generation.batch",
    "generate_batch": "generation.batch",
    "JiTConfig": "method.config",
    "PRESETS": "method.presets",
    "ArtefactError": "errors",
    "ConfigError": "errors",
    "NonFiniteVelocityError": "errors",
    "UnsupportedModelError": "errors",
    "Handle": "generation.handle",
    "handle_of": "generation.registry",
    "remove": "generation.registry",
    "noise_levels": "method.schedule",
    "Sound": "generation.sound",
    "Stats": "generation.stats",
    "__version__": "version",
}
__all__ = [
    "PRESETS",
    "ArtefactError",
    "Auto",
    "Choice",
    "ConfigError",
    "Exported",
    "Handle",
    "JiTConfig",
    "NonFiniteVelocityError",
    "Outcome",
    "Request",
    "Sound",
    "Stats",
    "UnsupportedModelError",
    "apply",
    "auto_config",
    "embedded_model",
    "export",
    "generate_batch",
    "handle_of",
    "load_exported",
    "noise_levels",
    "remove",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
