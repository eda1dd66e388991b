"""What the app makes of a request, without its page."""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import jitaccel
from jitaccel.app.studio import Studio, framed
from jitaccel.errors import CommandError
from tests.support import tiny
from tests.support.reports import data_of

PRESETS = ["few-steps", "7x-paper"]


def _ignore(share: float, words: str) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(tiny.pipeline(), "a/model")


def test_each_preset_is_shown_as_it_is_finished(studio: Studio) -> None:
    shown = list(studio.generate("a red circle", PRESETS, 3, "48x32", _ignore))
    assert [len(each.pictures) for each in shown] == [1, 2]
    assert shown[0].report is None and shown[0].frame == ""
    last = shown[-1]
    assert [caption.split(":")[0] for _, caption in last.pictures] == PRESETS
    assert Image.open(last.pictures[0][0]).size == (32, 48)
    assert last.report is not None
    takes = data_of(Path(last.report).read_text(encoding="utf-8"))
    assert [take["name"] for take in takes] == PRESETS


def test_progress_grows_to_the_end(studio: Studio) -> None:
    seen: list[tuple[float, str]] = []
    list(studio.generate("a red circle", PRESETS, 0, "48x48", lambda *said: seen.append(said)))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert seen[0][1].startswith("few-steps: step 1 of")


def test_report_is_framed_whole_and_can_touch_nothing(studio: Studio) -> None:
    last = list(studio.generate("a <b>red</b> circle", ["few-steps"], 0, "48x48", _ignore))[-1]
    inside = re.search(r'srcdoc="([^"]*)"', last.frame)
    assert inside is not None and last.report is not None
    assert html.unescape(inside[1]) == Path(last.report).read_text(encoding="utf-8")
    assert 'sandbox="allow-scripts"' in last.frame
    assert framed('"><script>').count("<") == 2


def test_code_makes_the_same_picture(studio: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompt = "a 'red' \"circle\"\n{of} \\ stripes"
    last = list(studio.generate(prompt, PRESETS, 7, "48x48", _ignore))[-1]
    ast.parse(last.code)
    from diffusers import DiffusionPipeline

    loaded: list[Any] = []

    def load(name: str, **settings: Any) -> Any:
        loaded.append((name, settings))
        return tiny.pipeline()

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    exec(compile(last.code, "code", "exec"), {})
    assert loaded == [("a/model", {"torch_dtype": torch.float32})]
    made, shown = (np.asarray(Image.open(path)) for path in ("picture.png", last.pictures[-1][0]))
    assert np.array_equal(made, shown)
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"prompt": "  "}, "prompt"),
        ({"presets": []}, "presets"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"size": "big"}, "size"),
        ({"size": "47x48"}, "multiples of 4"),
        ({"size": "0x48"}, "size"),
        ({"size": "48x40000"}, "size"),
    ],
)
def test_what_cannot_be_made_is_refused_before_it_is_begun(
    studio: Studio, given: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jitaccel.app.making, "apply", pytest.fail)
    request = {"prompt": "a red circle", "presets": PRESETS, "seed": 0, "size": "48x48", **given}
    with pytest.raises(CommandError, match=reason):
        list(studio.generate(**request, progress=_ignore))


def test_pipeline_is_untouched_after_a_request_that_was_given_up(studio: Studio) -> None:
    request = studio.generate("a red circle", PRESETS, 0, "48x48", _ignore)
    next(request)
    request.close()
    assert jitaccel.handle_of(studio.pipe) is None
