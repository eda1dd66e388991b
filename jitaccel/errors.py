"""Exceptions of the package, and what their messages suggest.

Message format: `<function>: <argument> must <rule>, got <value>; <what to do>`.
"""

import difflib
from collections.abc import Iterable

_ALIKE = 0.6  # share of letters that two names must have in common; "8x" is not "7x", "execution" is "executon"


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


def suggestion(name: object, allowed: Iterable[str], otherwise: str = "take one of these") -> str:
    """Returns what to do instead of `name`: the allowed name most like it, or `otherwise` where none is like it.

    Case is ignored. What is no text is like nothing.
    """
    by_folded = {candidate.casefold(): candidate for candidate in allowed}
    word = name.casefold() if isinstance(name, str) else ""
    matches = difflib.get_close_matches(word, by_folded, n=1, cutoff=_ALIKE)
    return f'did you mean "{by_folded[matches[0]]}"?' if matches else otherwise
