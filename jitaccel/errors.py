"""Exceptions of the package, and the nearest match that their messages suggest.

Message format: `<function>: <argument> must <rule>, got <value>; <what to do>`.
"""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be run; the message lists every reason, one a line."""


class UnsupportedModelError(RuntimeError):
    """A model or pipeline that no patch covers."""


class NonFiniteVelocityError(RuntimeError):
    """A model returned NaN or infinity, so that tokens cannot be ranked by importance."""


class ArtefactError(ValueError):
    """Exported stages that are damaged, or were made for something else than what is asked of them."""


class CommandError(Exception):
    """Arguments that a command cannot run with, or a file or package that it lacks."""


def nearest_match(name: object, allowed: Iterable[str], cutoff: float = 0.0) -> str:
    """Returns the allowed name most like `name`, ignoring case; an empty string when none is.

    cutoff: how alike they must be at least, from 0 (anything) to 1 (equal).
    """
    by_folded = {candidate.casefold(): candidate for candidate in allowed}
    matches = difflib.get_close_matches(str(name).casefold(), by_folded, n=1, cutoff=cutoff)
    return by_folded[matches[0]] if matches else ""
