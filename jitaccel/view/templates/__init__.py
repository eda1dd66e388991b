"""The templates, style and script of the pages, as files, and their loader."""

from __future__ import annotations

import functools

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(__package__.rpartition(".")[0], "templates"),
        autoescape=select_autoescape(enabled_extensions=("j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def template(name: str) -> Template:
    """Returns a template of this folder; it escapes everything that is inserted."""
    return _environment().get_template(name)
