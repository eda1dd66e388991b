"""The report file: its contents, its size, and that nothing in it can do harm."""

from __future__ import annotations

import base64
import dataclasses
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jitaccel import ConfigError
from jitaccel.view import write_report
from jitaccel.view.page import MOST_BYTES, report_html
from tests.support.reports import CONFIGS, PROMPT, data_of, playback, recorded, video_playback
from tests.support.tiny import NUM_TOKENS, SHORT

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'too' {{ 7 * 7 }}"


class _Tags(HTMLParser):
    """Collects tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def test_report_has_the_numbers_of_the_generation() -> None:
    shown = playback("subset")
    (take,) = data_of(report_html([shown]))
    stats = shown.stats
    assert [step["tokens"] for step in take["steps"]] == [step.tokens for step in stats.steps]
    assert [step["level"] for step in take["steps"]] == [round(step.noise_level, 6) for step in stats.steps]
    assert take["cost"] == pytest.approx(stats.dense_steps, abs=1e-3)
    assert take["steps"][-1]["cost"] == take["cost"]
    costs = [step["cost"] for step in take["steps"]]
    assert costs == sorted(costs)
    assert take["grid"] == list(stats.grid)


def test_report_has_the_tokens_of_each_stage() -> None:
    shown = playback("subset")
    (take,) = data_of(report_html([shown]))
    assert [stage["kind"] for stage in take["stages"]] == ["subset", "subset", "dense"]
    for stage, anchors in zip(take["stages"][:2], shown.stats.anchors, strict=False):
        bits = np.unpackbits(np.frombuffer(base64.b64decode(stage["ran"]), np.uint8), bitorder="little")
        assert np.flatnonzero(bits[:NUM_TOKENS]).tolist() == anchors[0].tolist()
        assert not bits[NUM_TOKENS:].any()


def test_pooled_stage_says_by_how_much() -> None:
    (take,) = data_of(report_html([playback("pooled")]))
    assert take["stages"][0] == {"kind": "pooled", "factor": 2, "tokens": NUM_TOKENS // 4}
    assert take["stages"][1]["kind"] == "dense"


def test_pictures_are_those_of_the_playback() -> None:
    shown = playback("subset")
    (take,) = data_of(report_html([shown]))
    for step, moment in zip(take["steps"], shown.moments, strict=True):
        for name, pixels in (("noisy", moment.noisy), ("clean", moment.clean)):
            header, _, data = step[name].partition(",")
            assert header == "data:image/webp;base64"
            image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
            assert image.shape == pixels.shape[1:]
            grey = (image.mean(axis=2).ravel(), pixels[0].mean(axis=2).ravel())  # colours of noise are made coarse
            assert np.corrcoef(*grey)[0, 1] > 0.8
    assert len({step["clean"] for step in take["steps"]}) == len(shown.moments)


def test_report_needs_nothing_else() -> None:
    page = report_html([playback(name) for name in CONFIGS])
    for tag, attributes in _Tags(page).tags:
        assert tag not in ("iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "http://" not in page and "https://" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_words_are_escaped() -> None:
    shown = dataclasses.replace(playback("subset"), name=EVIL, prompt=EVIL)
    other = dataclasses.replace(playback("dense"), prompt=EVIL + " other")
    for page in (report_html([shown]), report_html([shown, other], title=EVIL)):
        found = _Tags(page)
        assert sum(tag == "script" for tag, _ in found.tags) == 2
        assert not [tag for tag, _ in found.tags if tag == "img"]
        assert EVIL in found.text
        assert data_of(page)[0]["name"] == EVIL


def test_title_is_the_prompt_where_all_have_the_same() -> None:
    same = report_html([playback("dense"), playback("pooled")])
    assert f"<title>{PROMPT}</title>" in same
    other = dataclasses.replace(playback("dense"), prompt="blue square")
    text = _Tags(report_html([playback("pooled"), other])).text
    assert PROMPT in text and "blue square" in text


def test_generations_of_one_name_are_told_apart() -> None:
    page = report_html([playback("dense"), playback("dense"), playback("subset")])
    assert [take["name"] for take in data_of(page)] == ["dense (1)", "dense (2)", "subset"]


def _large(side: int, steps: int) -> Any:
    """Returns a playback of many large noisy pictures, which compress badly."""
    shown = playback("dense")
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (1, side, side, 3), np.uint8)
    moment = dataclasses.replace(shown.moments[0], noisy=noise, clean=noise)
    return dataclasses.replace(shown, moments=(moment,) * steps, final=noise)


@pytest.mark.parametrize("limit", [MOST_BYTES, 1_500_000])
def test_report_fits_in_the_limit(limit: int) -> None:
    page = report_html([_large(512, 30)], limit=limit)
    assert 0.3 * limit < len(page.encode()) <= limit


def test_report_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="must fit in"):
        report_html([_large(256, 40)], limit=100_000)


def test_empty_report_is_refused() -> None:
    with pytest.raises(ConfigError, match="got none"):
        report_html([])


def test_video_has_its_frames_below_each_other() -> None:
    shown = video_playback()
    (take,) = data_of(report_html([shown]))
    frames, height, width = shown.final.shape[:3]
    assert take["frames"] == frames == shown.stats.grid[0]
    data = base64.b64decode(take["final"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (width, frames * height)


def test_most_frames_keeps_first_and_last() -> None:
    from tests.support import video

    pipe = video.wan_pipeline(video.euler())
    import jitaccel

    with jitaccel.apply(pipe, SHORT.replace(schedule="native")) as handle:
        handle.record()
        video.generate(pipe)
        whole, two = (handle.playback(frames=count, progress=False) for count in (9, 2))
    assert np.array_equal(two.final, whole.final[[0, -1]])


def test_report_makes_its_folder(tmp_path: Path) -> None:
    handle, _ = recorded(SHORT)
    path = tmp_path / "new" / "a report.html"
    assert handle.report(str(path), prompt=PROMPT, progress=False) == path
    assert PROMPT in path.read_text(encoding="utf-8")
    again = write_report(path, [handle.playback(progress=False)], title="Now with a title")
    assert "<title>Now with a title</title>" in again.read_text(encoding="utf-8")


def test_notes_are_shown() -> None:
    shown = playback("dense")
    stats = dataclasses.replace(shown.stats, notes=("a remark <b>here</b>",))
    page = report_html([dataclasses.replace(shown, stats=stats)])
    assert "a remark &lt;b&gt;here&lt;/b&gt;" in page
