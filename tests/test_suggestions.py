"""Every public function that takes a name suggests the right one for a typo, and nothing for unrelated words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import jitaccel
from jitaccel.errors import suggestion
from jitaccel.evaluation.quality.scorers import scorer_factory
from jitaccel.execution.attention.choice import check_attention
from jitaccel.execution.options import Execution
from jitaccel.method.presets import resolve

SEVEN = jitaccel.PRESETS["7x"]


def _apply(name: str) -> Callable[[str], Any]:
    return lambda word: jitaccel.apply(nn.Linear(1, 1), **{name: word})


def _field(name: str) -> Callable[[str], Any]:
    return lambda word: SEVEN.replace(**{name: word})


def _option(name: str) -> Callable[[str], Any]:
    return lambda word: Execution(**{name: word})


ENTRIES: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "apply: an argument": (lambda word: jitaccel.apply(nn.Linear(1, 1), **{word: 1}), "executon", "execution"),
    "apply: a field": (lambda word: jitaccel.apply(nn.Linear(1, 1), **{word: 1}), "step", "steps"),
    "apply: preset": (_apply("preset"), "7x-papers", "7x-paper"),
    "apply: auto": (_apply("preset"), "atuo", "auto"),
    "apply: execution": (_apply("execution"), "pakced", "packed"),
    "apply: attention": (_apply("attention"), "xformer", "xformers"),
    "apply: on_unsupported": (_apply("on_unsupported"), "dens", "dense"),
    "apply: controlnet": (_apply("controlnet"), "anchor", "anchors"),
    "apply: compile": (_apply("compile"), "max-autotun", "max-autotune"),
    "apply: an option of inductor": (
        lambda word: jitaccel.apply(nn.Linear(1, 1), compile={"options": {word: True}}), "max_autotun", "max_autotune"
    ),
    "Execution: execution": (_option("execution"), "Auto", "auto"),
    "Execution: attention": (_option("attention"), "flashattn", "flash_attn"),
    "check_attention": (check_attention, "sdap", "sdpa"),
    "resolve: preset": (resolve, "dens", "dense"),
    "resolve: a field": (lambda word: resolve("7x", **{word: 1}), "relaxsteps", "relax_steps"),
    "replace: a field": (lambda word: SEVEN.replace(**{word: 1}), "density", "densities"),
    "from_dict: a field": (lambda word: jitaccel.JiTConfig.from_dict({word: 1}), "microflow", "micro_flow"),
    "JiTConfig: schedule": (_field("schedule"), "betas", "beta"),
    "JiTConfig: lifter": (_field("lifter"), "velocty", "velocity"),
    "JiTConfig: micro_flow": (_field("micro_flow"), "release", "released"),
    "JiTConfig: noise": (_field("noise"), "Own", "own"),
    "JiTConfig: solver": (_field("solver"), "eulers", "euler"),
    "Request: preset": (lambda word: jitaccel.Request(prompt="", preset=word).config(), "4", "4x"),
    "export: format": (
        lambda word: jitaccel.export(None, "no_such_folder", size=(16, 16), format=word),  # type: ignore[arg-type]
        "torchscrip", "torchscript",
    ),
    "export: an argument": (
        lambda word: jitaccel.export(None, "no_such_folder", size=(16, 16), **{word: 1}), "batchsize", "batch_size"
    ),
    "auto_config: an argument": (
        lambda word: jitaccel.auto_config(None, target_ms=1.0, **{word: 1}), "text_token", "text_tokens"
    ),
    "eval: a metric": (scorer_factory, "pnsr", "psnr"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("entry", ENTRIES)
def test_typo_gets_the_right_name(entry: str) -> None:
    call, typo, right = ENTRIES[entry]
    with pytest.raises(ValueError, match=f'{typo}.*did you mean "{right}"'):
        call(typo)


@pytest.mark.parametrize("entry", ENTRIES)
def test_nonsense_gets_no_name(entry: str) -> None:
    call, *_ = ENTRIES[entry]
    with pytest.raises(ValueError, match="zzzzzz") as raised:
        call("zzzzzz")
    assert "did you mean" not in str(raised.value)


def test_what_is_no_text_is_like_no_name() -> None:
    assert suggestion(None, ["none", "nine"], "give one") == suggestion(1, ["1x"], "give one") == "give one"
    assert suggestion("a", [], "give one") == "give one"
    assert suggestion("STEP", ["alpha", "steps"]) == 'did you mean "steps"?'


def test_suggestions_are_made_in_one_place() -> None:
    root = Path(jitaccel.__file__).parent
    found = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if "did you mean" in path.read_text()}
    found |= {path.relative_to(root).as_posix() for path in root.rglob("*.py") if "difflib" in path.read_text()}
    assert found == {"errors.py"}
