"""What MkDocs does beyond mkdocs.yml: the changelog as a page, links that leave docs/, nothing loaded from elsewhere.

A page of docs/ may link to a file of the checkout (`../examples/batch.py`), which works where the repository is
browsed. The site has no such files: there the link leads to `repo_url` if mkdocs.yml names one, else its text stays.
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
    """Returns a page whose links to files outside docs/ lead into the repository, or are text where there is none."""

    def link(match: re.Match[str]) -> str:
        if repository is None:
            return match["text"]
        return f"[{match['text']}]({repository.rstrip('/')}/blob/main/{match['path']})"

    return _OUTSIDE.sub(link, markdown)


def loaded_from_elsewhere(html: str) -> list[str]:
    """Returns the addresses of scripts, pictures, frames and style sheets that a page loads from other sites."""
    return _LOADED.findall(html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Fails where a page of the site would load something from another site."""
    if addresses := loaded_from_elsewhere(output):
        raise PluginError(f"{page.file.src_uri} must load nothing from elsewhere, got {', '.join(addresses)}")
    return output


def on_files(files: Files, config: Any) -> Files:
    """Adds CHANGELOG.md, whose place is the root of the checkout."""
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Returns the page as the site has it."""
    return outside_links(markdown, config.repo_url or None)
