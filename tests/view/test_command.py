"""`jitaccel view`, and `jitaccel generate --report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jitaccel.app.making import Wanted, make_each, steps_of
from tests.support import tiny
from tests.support.reports import data_of

SMALL = ("--size", "48x48", "--max-sequence-length", 8, "--prompt", "a red circle")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline().save_pretrained(folder)
    return folder


def test_view_writes_the_presets_next_to_each_other(command: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    status, said, _ = command("view", *SMALL, "--model", model, "--presets", "few-steps, 7x-paper", "--out", out)
    assert status == 0
    assert str(out) in said
    takes = data_of(out.read_text(encoding="utf-8"))
    assert [take["name"] for take in takes] == ["few-steps", "7x-paper"]
    assert [len(take["steps"]) for take in takes] == [steps_of("few-steps"), steps_of("7x-paper")]


def test_generate_writes_a_report(command: Any, model: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "picture.png", tmp_path / "report.html"
    call = ("--model", model, "--size", "48x48", "--max-sequence-length", 8, "--prompt", "a red <circle>")
    status, said, _ = command("generate", *call, "--out", out, "--report", report)
    assert status == 0
    assert str(report) in said
    page = report.read_text(encoding="utf-8")
    assert "<title>a red &lt;circle&gt;</title>" in page
    (take,) = data_of(page)
    assert take["name"] == "7x"
    plain = tmp_path / "plain.png"
    assert command("generate", *call, "--out", plain)[0] == 0
    assert plain.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--presets", "7x,8y"), "8y"),
        (("--presets", ","), "--presets"),
        (("--presets", "7x,7x"), "--presets"),
        (("--size", "48x"), "--size"),
        (("--out", "report.png"), "--out"),
        (("--seed", -1), "--seed"),
        (("--max-sequence-length", 0), "--max-sequence-length"),
    ],
)
def test_bad_view_arguments_are_refused_in_one_line(command: Any, arguments: Any, reason: str) -> None:
    status, _, error = command("view", "--prompt", "a red circle", "--model", "/nowhere", *arguments)
    assert status == 2
    assert reason in error
    assert len(error.strip().splitlines()) == 1


def test_size_that_is_no_multiple_is_refused(command: Any, model: Path, tmp_path: Path) -> None:
    call = ("--prompt", "a", "--model", model, "--size", "50x48", "--out", tmp_path / "r.html")
    status, _, error = command("view", *call)
    assert status == 2
    assert "a multiple of 4 pixels" in error


def test_report_that_exists_is_not_replaced_unasked(command: Any, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("mine")
    for call in (("view", "--out", out), ("generate", "--out", tmp_path / "p.png", "--report", out)):
        status, _, error = command(*call, "--prompt", "a red circle", "--model", "/nowhere")
        assert status == 2
        assert "--overwrite" in error
    assert out.read_text() == "mine"


def test_report_of_an_untouched_pipeline_is_refused(command: Any, tmp_path: Path) -> None:
    call = ("--preset", "none", "--out", tmp_path / "p.png", "--report", tmp_path / "r.html")
    status, _, error = command("generate", *call, "--prompt", "a", "--model", "/nowhere")
    assert status == 2
    assert "--preset dense" in error


def test_presets_start_from_the_same_noise_and_count_their_steps() -> None:
    pipe, seen = tiny.pipeline(), []
    wanted = Wanted(prompt="a red circle", height=48, width=48, seed=3, text_tokens=8)
    presets = ("few-steps", "7x-paper")
    made = list(make_each(pipe, presets, wanted, on_step=lambda *step: seen.append(step)))
    assert [each.preset for each in made] == list(presets)
    first, second = (each.playback.moments[0].noisy for each in made)
    assert (first == second).all()
    assert seen == [(name, k + 1, steps_of(name)) for name in presets for k in range(steps_of(name))]
    assert made[0].image.size == (48, 48)
