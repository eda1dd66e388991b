"""The pages of the site: links work, every page is in the menu, and generated tables are up to date."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import jitaccel
from benchmarks.table import filled, read_results

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md")])
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def links(page: Path) -> Iterator[str]:
    """Yields the targets of a page's links, without those to other sites."""
    for match in _LINK.finditer(_CODE.sub("", page.read_text())):
        if not match["target"].startswith(("http://", "https://", "mailto:")):
            yield match["target"]


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as MkDocs and GitHub both make them of plain words."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = page if path == "" else page.parent / path
        assert file.resolve().is_relative_to(ROOT) and file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_pages_are_many_and_links_are_found() -> None:
    assert len(PAGES) > 20
    assert sum(len(list(links(page))) for page in PAGES) > 40


def test_every_page_is_in_the_menu() -> None:
    menu = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert menu == {page.name for page in DOCS.glob("*.md")} | {"changelog.md"}


def test_api_page_names_what_is_public() -> None:
    shown = re.findall(r"^::: (jitaccel\.[\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    homes = {f"jitaccel.{home}.{name}" for name, home in jitaccel._HOMES.items() if name != "__version__"}
    assert len(shown) == len(set(shown)) and set(shown) == homes


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/presets.md"])
def test_tables_made_of_the_code_are_up_to_date(page: str) -> None:
    text = (ROOT / page).read_text()
    assert "<!-- table: " in text
    assert filled(text, read_results(ROOT / "benchmarks" / "results")) == text, f"run python -m benchmarks.table {page}"


def test_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 7 * 1024


@pytest.mark.parametrize(
    ("repository", "shown"),
    [
        (None, "see a script here"),
        ("https://example.org/a", "see [a script](https://example.org/a/blob/main/x/y.py) here"),
    ],
)
def test_links_out_of_the_site_are_text_or_lead_into_the_repository(repository: str | None, shown: str) -> None:
    pytest.importorskip("mkdocs")
    from release.site import outside_links

    assert outside_links("see [a script](../x/y.py) here", repository) == shown
    assert outside_links("see [a page](page.md) here", repository) == "see [a page](page.md) here"


def test_what_a_page_loads_from_other_sites_is_found_and_its_links_are_not() -> None:
    site = pytest.importorskip("release.site")
    page = '<script src="https://a/b.js"></script><a href="https://e">e</a>'
    assert site.loaded_from_elsewhere(page) == ["https://a/b.js"]
    assert site.loaded_from_elsewhere('<link rel="stylesheet" href="https://c/d.css">') == ["https://c/d.css"]
    assert site.loaded_from_elsewhere('<img alt="x" src="7x.jpg"><link rel="icon" href="https://f">') == []
