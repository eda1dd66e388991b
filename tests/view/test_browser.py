"""A report in a real browser: slider, keys, play, comparison, tokens; no errors, and nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jitaccel.view import write_report
from tests.support.browser import Page, browser_page
from tests.support.reports import CONFIGS, playback, video_playback

STEPS = [len(playback(name).moments) for name in CONFIGS]
READY = "document.body.dataset.ready === 'true'"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three reports: of several generations, of one, of a video."""
    folder = tmp_path_factory.mktemp("reports")
    write_report(folder / "several.html", [playback(name) for name in CONFIGS])
    write_report(folder / "one.html", [playback("subset")])
    write_report(folder / "video.html", [video_playback()])
    return folder


@pytest.fixture
def show(browser: Page, folder: Path) -> Iterator[Any]:
    """Opens a report, at a place of its address; afterwards it must have had no error."""
    browser.errors.clear()

    def show(name: str, at: str = "at=0", **look: Any) -> Page:
        browser.look(**look)
        browser.open("about:blank")
        browser.open(f"{(folder / name).as_uri()}#{at}")
        browser.wait(READY)
        return browser

    yield show
    assert browser.errors == []


def places(page: Page) -> list[int]:
    """Returns the step that each generation is shown at; its number of steps for the finished picture."""
    found = page.evaluate("[...document.querySelectorAll('[data-take]')].map(card => card.dataset.place)")
    return [int(place) for place in found]


def pictures(page: Page, panel: str) -> list[str]:
    found: list[str] = page.evaluate(
        f"[...document.querySelectorAll('.{panel} canvas')].map(canvas => canvas.toDataURL())"
    )
    return found


def test_arrow_keys_move_the_steps_and_change_every_picture(show: Any) -> None:
    page = show("one.html")
    count = len(playback("subset").moments)
    seen = {panel: [pictures(page, panel)[0]] for panel in ("noisy", "clean", "ran")}
    for step in range(1, count + 1):
        page.press("ArrowRight")
        assert places(page) == [step]
        for panel, before in seen.items():
            before.append(pictures(page, panel)[0])
    assert len(set(seen["noisy"])) == count + 1
    assert len(set(seen["clean"])) == count  # Euler's last prediction is the finished picture
    assert len(set(seen["ran"])) == count
    page.press("ArrowRight")
    assert places(page) == [count]
    page.press("Home")
    assert places(page) == [0]
    assert pictures(page, "clean")[0] == seen["clean"][0]
    page.press("End")
    assert places(page) == [count]


def test_slider_is_dragged(show: Any) -> None:
    page = show("several.html")
    before = pictures(page, "clean")
    page.drag("#step", 0.02, 0.98)
    assert places(page) == STEPS
    after = pictures(page, "clean")
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_what_is_shown_is_said(show: Any) -> None:
    page = show("one.html", "at=2")
    stats = playback("subset").moments[2].stats
    text = page.evaluate("document.querySelector('[data-take]').innerText")
    assert f"step 3 of {len(playback('subset').moments)}" in text
    assert f"{stats.tokens} of 144 tokens" in text
    assert f"noise level {stats.noise_level:.3f} → {stats.next_level:.3f}" in text
    spent = sum(moment.stats.flops for moment in playback("subset").moments[:3])
    cost = spent / playback("subset").stats.dense_step_flops
    assert f"cost {cost:.2f}".rstrip("0").rstrip(".") in text


def test_moments_when_tokens_are_added_are_marked(show: Any) -> None:
    page = show("one.html")
    marks = page.evaluate("[...document.querySelectorAll('.strip .grew')].map(bar => bar.dataset.grew)")
    tokens = [moment.stats.tokens for moment in playback("subset").moments]
    assert marks == [f"{before} → {after} tokens" for before, after in pairwise(tokens) if after > before]
    assert page.evaluate("document.querySelectorAll('#ticks i').length") == len(marks) == 2


def test_tokens_so_far_are_another_picture(show: Any) -> None:
    page = show("several.html", "at=3")
    before = pictures(page, "ran")
    page.press("t")
    heat = pictures(page, "ran")
    assert all(one != other for one, other in zip(before, heat, strict=True))
    page.press("t")
    assert pictures(page, "ran") == before


def test_tokens_that_did_not_run_are_dimmed(show: Any) -> None:
    page = show("one.html", "at=0")
    anchors = set(playback("subset").stats.anchors[0][0].tolist())
    size, pixels = page.evaluate(
        "(canvas => [canvas.width, [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]])"
        "(document.querySelector('.ran canvas'))"
    )
    alpha = np.array(pixels).reshape(size, size, 4)[..., 3]
    middles = (np.arange(12) * size + size // 2) // 12
    assert set(np.flatnonzero(alpha[np.ix_(middles, middles)] == 255).tolist()) == anchors


def test_same_cost_stops_each_generation_where_it_has_cost_as_much(show: Any) -> None:
    page = show("several.html")
    page.press("c")
    page.press("Home")
    assert places(page) == [-1, -1, -1]
    spent = 3.0 + 1e-6
    while "cost 3 dense" not in page.evaluate("document.getElementById('where').textContent"):
        page.press("ArrowRight")
    expected = []
    for name in CONFIGS:
        shown = playback(name)
        flops = [moment.stats.flops for moment in shown.moments]
        done = sum(sum(flops[: k + 1]) / shown.stats.dense_step_flops <= spent for k in range(len(flops)))
        expected.append(done if done == len(flops) else done - 1)
    assert places(page) == expected
    page.press("End")
    assert places(page) == STEPS


def test_play_runs_to_the_end_and_stops(show: Any) -> None:
    page = show("one.html")
    page.click("#play")
    assert page.evaluate("document.getElementById('play').getAttribute('aria-pressed')") == "true"
    page.wait(f"document.querySelector('[data-take]').dataset.place === '{len(playback('subset').moments)}'")
    page.wait("document.getElementById('play').getAttribute('aria-pressed') === 'false'")
    page.press("Home")
    page.press(" ")
    page.wait("Number(document.querySelector('[data-take]').dataset.place) > 0")
    page.press(" ")
    assert page.evaluate("document.getElementById('play').getAttribute('aria-pressed')") == "false"


def test_comparison_is_dragged_between_two_generations(show: Any) -> None:
    page = show("several.html", "at=6&cut=50")
    assert page.evaluate("[...document.querySelectorAll('.tag')].map(tag => tag.textContent)") == ["dense", "subset"]
    page.drag("#cut", 0.5, 0.2)
    cut = page.evaluate("parseFloat(document.getElementById('pair').style.getPropertyValue('--cut'))")
    assert 15 < cut < 25
    page.evaluate("(pick => { pick.value = 2; pick.onchange(); })(document.getElementById('right'))")
    assert page.evaluate("document.querySelector('.tag.right').textContent") == "pooled"
    assert page.evaluate("document.querySelector('.under').toDataURL()") == pictures(page, "clean")[2]


def test_address_brings_back_what_was_shown(show: Any) -> None:
    page = show("several.html", "at=2")
    page.press("c")
    page.press("t")
    page.press("ArrowRight")
    page.drag("#cut", 0.5, 0.8)
    address = page.evaluate("location.hash.slice(1)")
    where = places(page)
    again = show("several.html", address)
    assert places(again) == where
    assert again.evaluate("location.hash.slice(1)") == address
    checked = "[...document.querySelectorAll('input[type=radio]:checked')].map(input => input.value)"
    assert again.evaluate(checked) == ["cost", "heat"]


@pytest.mark.parametrize("address", ["at=-5", "at=9999", "at=x&by=nothing&tokens=%22%5D", "left=17&cut=abc", "%%%"])
def test_broken_address_is_harmless(show: Any, address: str) -> None:
    page = show("several.html", address)
    assert all(0 <= place <= count for place, count in zip(places(page), STEPS, strict=True))


def test_video_plays_its_frames_until_it_is_told_not_to(show: Any) -> None:
    page = show("video.html", "at=3")
    first = pictures(page, "clean")[0]
    page.wait(f"document.querySelector('.clean canvas').toDataURL() !== '{first}'")
    page.click("#frames")
    held = pictures(page, "clean")[0]
    page.evaluate("new Promise(done => setTimeout(done, 400))")
    assert pictures(page, "clean")[0] == held


@pytest.mark.parametrize("width", [320, 390, 768, 1600])
@pytest.mark.parametrize("name", ["several.html", "video.html"])
def test_page_is_as_wide_as_the_window(show: Any, width: int, name: str) -> None:
    page = show(name, "at=2", width=width, touch=width < 500)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_page_is_dark(show: Any) -> None:
    paper, ink = _brightness(show("one.html"))
    assert paper > 600 > 200 > ink
    paper, ink = _brightness(show("one.html", dark=True))
    assert ink > 600 > 200 > paper


def _brightness(page: Page) -> list[int]:
    """Returns red, green and blue together, of the page's background and of its text."""
    style = "getComputedStyle(document.body)"
    colours = page.evaluate(f"[{style}.backgroundColor, {style}.color]")
    return [sum(int(part) for part in re.findall(r"\d+", colour)[:3]) for colour in colours]
