"""The app's page: its interface, its queue, and a request through a browser. Needs Gradio."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jitaccel.cli import main
from tests.support import tiny

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not installed")


@pytest.mark.parametrize("name", ["gradio"])
def test_missing_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda what: None if what == name else found(what))
    assert main(["app"]) == 2
    error = capsys.readouterr().err
    assert 'pip install "jitaccel[app]"' in error
    assert len(error.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Serves the app with a tiny pipeline."""
    from jitaccel.app.page import build
    from jitaccel.app.studio import Studio

    page = build(Studio(tiny.pipeline(), "a/model"))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


@needs_gradio
def test_one_generation_runs_at_a_time() -> None:
    from jitaccel.app.page import build
    from jitaccel.app.studio import Studio

    page = build(Studio(tiny.pipeline(), "a/model"))
    events = [event for event in page.fns.values() if event.api_name and str(event.api_name).startswith("generate")]
    assert len(events) == 2
    assert {(event.concurrency_limit, event.concurrency_id) for event in events} == {(1, "pipeline")}


@needs_gradio
def test_request_through_the_interface(address: str) -> None:
    from gradio_client import Client

    client = Client(address, verbose=False)
    pictures, steps, files, code = client.predict("a red circle", ["few-steps"], 3, "48x48", api_name="/generate")
    assert len(pictures) == 1
    assert "<iframe" in str(steps)
    assert [Path(file).suffix for file in files] == [".html", ".png"]
    assert "manual_seed(3)" in code


@needs_gradio
def test_bad_request_is_said_and_the_next_one_runs(address: str) -> None:
    from gradio_client import Client

    client = Client(address, verbose=False)
    with pytest.raises(Exception, match="multiples of 4"):
        client.predict("a red circle", ["few-steps"], 3, "47x48", api_name="/generate")
    assert client.predict("a red circle", ["few-steps"], 3, "48x48", api_name="/generate")


@needs_gradio
def test_steps_and_report_are_shown_in_the_page(address: str, tmp_path: Path) -> None:
    from tests.support.browser import browser_page

    with browser_page(tmp_path) as page:
        page.look(width=1280, height=900)
        page.open(address)
        _fill(page, "textarea", "a red circle")
        _fill(page, "input[type=number]", "1")
        page.evaluate(
            "var seen = []; const see = () => document.querySelectorAll('[role=progressbar]')"
            ".forEach(bar => seen.push(Number(bar.ariaValueNow)));"
            "new MutationObserver(see).observe(document.body, {childList: true, subtree: true})"
        )
        page.evaluate("[...document.querySelectorAll('button')].find(b => b.textContent.trim() === 'Generate').click()")
        page.wait("document.querySelector('iframe[title=report]') !== null")
        shares = page.evaluate("seen")
        assert len(set(shares)) > 1 and shares == sorted(shares)
        captions = "[...document.querySelectorAll('button[aria-label], figcaption, .caption-label')]"
        page.wait(f"{captions}.some(each => /7x: 11 steps/.test(each.textContent + each.ariaLabel))")
        frame = "document.querySelector('iframe[title=report]').srcdoc"
        assert page.evaluate(f"{frame}.includes('a red circle')")


@needs_gradio
@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_as_wide_as_the_window(address: str, tmp_path: Path, width: int) -> None:
    from tests.support.browser import browser_page

    with browser_page(tmp_path) as page:
        page.look(width=width, height=900, touch=width < 500)
        page.open(address)
        page.wait("[...document.querySelectorAll('button')].some(b => b.textContent.trim() === 'Generate')")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def _fill(page: Any, selector: str, text: str) -> None:
    page.wait(f"document.querySelector('{selector}') !== null")
    page.evaluate(
        f"(box => {{ box.value = '{text}'; box.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
        f"(document.querySelector('{selector}'))"
    )
