"""The app's handling of a request, without its page."""

from __future__ import annotations

import ast
import html
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import jitaccel
from jitaccel.app.making import Wanted, make_each, steps_of
from jitaccel.app.studio import Studio, framed
from jitaccel.app.threads import THREAD
from jitaccel.errors import CommandError, ConfigError
from jitaccel.view.underway import Glimpse
from tests.support import tiny
from tests.support.reports import data_of

PRESETS = ["few-steps", "7x-paper"]


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(tiny.pipeline(), "a/model")


def test_each_step_and_each_preset_is_shown_as_it_is_finished(studio: Studio) -> None:
    shown = list(studio.generate("a red circle", PRESETS, 3, "48x32"))
    steps = [steps_of(preset) for preset in PRESETS]
    assert [len(each.pictures) for each in shown] == [0] * steps[0] + [1] * (steps[1] + 1) + [2, 2]
    assert all(each.report is None for each in shown[:-1])
    last = shown[-1]
    assert [caption.split(":")[0] for _, caption in last.pictures] == PRESETS
    assert Image.open(last.pictures[0][0]).size == (32, 48)
    assert last.report is not None
    takes = data_of(Path(last.report).read_text(encoding="utf-8"))
    assert [take["name"] for take in takes] == PRESETS


def test_step_under_way_has_its_number_its_pictures_and_the_share_done(studio: Studio) -> None:
    shown = [each.steps for each in studio.generate("a red circle", PRESETS, 0, "48x48") if "progressbar" in each.steps]
    shares = [float(re.findall(r'valuenow="([0-9.]+)"', text)[0]) for text in shown]
    assert shares == sorted(shares) and shares[-1] == 100.0
    assert "few-steps" in shown[0] and f"step 1 of {steps_of('few-steps')}" in shown[0]
    sources = [re.findall(r'src="(data:image/webp;base64,[^"]+)"', text) for text in shown]
    assert all(len(pair) == 2 for pair in sources)
    assert sources[0][0] != sources[0][1]  # few-steps begins with some of the tokens
    assert len({pair[0] for pair in sources}) > steps_of("7x-paper")


def test_pictures_shown_under_way_are_those_of_the_report() -> None:
    glimpses: list[Glimpse] = []
    wanted = Wanted(prompt="a red circle", height=48, width=48)
    (made,) = make_each(tiny.pipeline(), ["7x-paper"], wanted, on_glimpse=glimpses.append)
    (plain,) = make_each(tiny.pipeline(), ["7x-paper"], wanted)
    assert np.array_equal(np.asarray(made.image), np.asarray(plain.image))
    for glimpse, moment, decoded in zip(glimpses, made.playback.moments, plain.playback.moments, strict=True):
        assert np.array_equal(glimpse.predicted, moment.clean)
        assert np.array_equal(moment.clean, decoded.clean)


def test_time_does_not_count_what_is_shown_under_way() -> None:
    wanted = Wanted(prompt="a red circle", height=48, width=48)
    seconds = []
    for pause in (0.0, 0.3):
        (made,) = make_each(tiny.pipeline(), ["few-steps"], wanted, on_glimpse=lambda _, pause=pause: time.sleep(pause))
        seconds.append(made.seconds)
    assert seconds[1] < seconds[0] + 0.3 * steps_of("few-steps") / 2


def test_report_is_framed_whole_and_can_touch_nothing(studio: Studio) -> None:
    last = list(studio.generate("a <b>red</b> circle", ["few-steps"], 0, "48x48"))[-1]
    inside = re.search(r'srcdoc="([^"]*)"', last.steps)
    assert inside is not None and last.report is not None
    assert html.unescape(inside[1]) == Path(last.report).read_text(encoding="utf-8")
    assert 'sandbox="allow-scripts"' in last.steps
    assert framed('"><script>').count("<") == 2


def test_code_makes_the_same_picture(studio: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompt = "a 'red' \"circle\"\n{of} \\ stripes"
    last = list(studio.generate(prompt, PRESETS, 7, "48x48"))[-1]
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
    for preset, (path, _) in zip(PRESETS, last.pictures, strict=True):
        made, shown = (np.asarray(Image.open(each)) for each in (f"{preset}.png", path))
        assert np.array_equal(made, shown)
        assert (tmp_path / f"{preset}.html").is_file()


@pytest.mark.parametrize(
    ("offload", "call"),
    [("none", "pipe.to('cpu')"), ("model", ".enable_model_cpu_offload()"), ("sequential", ".enable_sequential_cpu")],
)
def test_code_places_the_pipeline_as_it_was_loaded(offload: str, call: str) -> None:
    code = Studio(tiny.pipeline(), "a/model", offload).code(PRESETS, Wanted(prompt="", height=48, width=48))
    assert call in code


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
        list(studio.generate(**request))


def test_what_goes_wrong_while_pictures_are_made_is_raised(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ConfigError("no such thing")

    monkeypatch.setattr(jitaccel.app.making, "apply", fail)
    with pytest.raises(ConfigError, match="no such thing"):
        list(studio.generate("a red circle", PRESETS, 0, "48x48"))


def test_pipeline_is_untouched_after_a_request_that_was_given_up(studio: Studio) -> None:
    request = studio.generate("a red circle", PRESETS, 0, "48x48")
    next(request)
    request.close()
    assert not [each for each in threading.enumerate() if each.name == THREAD]
    assert jitaccel.handle_of(studio.pipe) is None
