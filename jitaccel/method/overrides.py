"""The fields of a configuration as keywords."""

from typing import Literal, TypedDict


class Overrides(TypedDict, total=False):
    """The fields of JiTConfig as keywords, so that editors complete them; JiTConfig says what each is."""

    densities: tuple[float, ...]
    boundaries: tuple[float, ...]
    steps: int | Literal["caller"]
    schedule: Literal["beta", "log_snr", "native"] | tuple[float, ...]
    alpha: float
    beta: float
    log_snr: tuple[float, float]
    lifter: Literal["velocity", "clean"]
    micro_flow: Literal["exact", "released", "none"]
    relax_steps: int
    noise: Literal["fresh", "own"]
    solver: Literal["euler", "dpmpp_2m", "caller"]
    importance_window: int
    blur_scale: float
    pooling: tuple[int, ...]
    multiple: int
