"""MkDocs hooks: add the changelog as a page, rewrite links that leave docs/, refuse resources from other sites.

A page in docs/ may link to a file in the checkout (`../examples/batch.py`), which works in a repository browser. The
site does not contain such files. The link leads to `repo_url` if mkdocs.yml sets it, and otherwise becomes plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_LOADED = re.compile(r"<(?:script|img|iframe|link(?= [^>]*stylesheet))[^>]* (?:src|href)=[\"']?(https?:[^\"' >]+)")
_OUTSIDE = re.compile(r"\[(?P<text>[^\]]+)\]\(\.\./(?P<path>[^)\s]+)\)")


def outside_links(markdown: str, repository: str | None) -> str:
    """Returns a page whose links to files outside docs/ lead to the repository, or become text without a repository."""

    def link(match: re.Match[str]) -> str:
        if repository is None:
            return match["text"]
        return f"[{match['text']}]({repository.rstrip('/')}/blob/main/{match['path']})"

    return _OUTSIDE.sub(link, markdown)


def loaded_from_elsewhere(html: str) -> list[str]:
    """Returns the URLs of scripts, pictures, frames and style sheets that a page loads from other sites."""
    return _LOADED.findall(html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Raises PluginError if a page would load something from another site."""
    if addresses := loaded_from_elsewhere(output):
        raise PluginError(f"{page.file.src_uri} must load nothing from elsewhere, got {', '.join(addresses)}")
    return output


def on_files(files: Files, config: Any) -> Files:
    """Adds CHANGELOG.md from the root of the checkout."""
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Returns the page with its links rewritten for the site."""
    return outside_links(markdown, config.repo_url or None)
