"""The fields of a configuration as keywords, and the check of keywords that a caller passes."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypedDict

from ..errors import ConfigError, suggestion


class Overrides(TypedDict, total=False):
    """The fields of JiTConfig as keywords, so that editors complete them; JiTConfig documents them."""

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


def arguments_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the keywords of a public function, without its target and the fields of JiTConfig."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return tuple(each.name for each in parameters if each.kind in kinds and each.name != "target")


def check_fields(function: str, names: Iterable[str], arguments: Iterable[str] = ()) -> None:
    """Raises ConfigError, listing every problem, for names that are not fields of JiTConfig.

    Args:
        function: The function that was called with these names.
        names: The names given.
        arguments: The function's own arguments, as candidates for a misspelled name.
    """
    fields, own = tuple(Overrides.__annotations__), tuple(arguments)
    known = f"an argument of {function} or a field of JiTConfig" if own else "a field of JiTConfig"
    where = f"see help(jitaccel.{function})" if own else f"it has {', '.join(fields)}"
    if problems := [
        f"{function}: {name} must be {known}, got an unknown name; {suggestion(name, (*own, *fields), where)}"
        for name in names
        if name not in fields
    ]:
        raise ConfigError("\n".join(problems))
