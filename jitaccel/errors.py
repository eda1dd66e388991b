"""Exceptions of the package, and suggestions for misspelled names.

Message format: `<function>: <argument> must <rule>, got <value>; <what to do>`.
"""

import difflib
from collections.abc import Iterable

_ALIKE = 0.6  # difflib's similarity ratio; "executon" suggests "execution", but "8x" does not suggest "7x"


class ConfigError(ValueError):
    """An invalid configuration. The message lists every problem, one per line."""


class UnsupportedModelError(RuntimeError):
    """A model or pipeline that no patch covers."""


class NonFiniteVelocityError(RuntimeError):
    """A model returned NaN or infinity, so tokens cannot be ranked by importance."""


class ArtefactError(ValueError):
    """Exported stages that are damaged or incomplete, or do not fit this software, machine or request."""


class CommandError(Exception):
    """A command cannot run: an argument is invalid, or a file or package is missing."""


def suggestion(name: object, allowed: Iterable[str], otherwise: str = "choose one of these") -> str:
    """Returns advice for an unknown name: the most similar allowed name, or `otherwise` if none is similar.

    Case is ignored. A `name` that is not a string matches nothing.
    """
    by_folded = {candidate.casefold(): candidate for candidate in allowed}
    word = name.casefold() if isinstance(name, str) else ""
    matches = difflib.get_close_matches(word, by_folded, n=1, cutoff=_ALIKE)
    return f'did you mean "{by_folded[matches[0]]}"?' if matches else otherwise
