"""`jitaccel eval` of any model, on prompts from a file, with metrics of packages and custom ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jitaccel
from jitaccel.cli import main
from jitaccel.errors import CommandError
from jitaccel.evaluation.prompts import read_prompts
from jitaccel.evaluation.scenes.judge import NUM_FEATURES, Judge, JudgeNetwork
from jitaccel.evaluation.scenes.prompts import held_out
from jitaccel.evaluation.scoring import parse_metrics

pytest.importorskip("diffusers")
STUB = """
import json, pathlib

def length(prompts, pictures):
    with open("asked.jsonl", "a") as file:
        file.write(json.dumps([prompts, list(pictures.shape)]) + "\\n")
    return [len(text) + picture.mean() / 255 for text, picture in zip(prompts, pictures, strict=True)]

def furthest(prompts, pictures, references):
    return abs(pictures.astype(float) - references).max(axis=(1, 2, 3))

def wrong(prompts, pictures):
    return [float("nan")] * len(pictures)

def made():
    return length
"""


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts, a small sparse method, and importable custom metrics."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = {"densities": [0.4, 1.0], "boundaries": [0.5, 1.0], "steps": 4}
    (tmp_path / "sparse.json").write_text(json.dumps(config))
    name = f"stub_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(STUB)
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square on the left\n")
    return tmp_path


@pytest.fixture
def stub(in_folder: Path) -> str:
    """The name of the module of metrics."""
    return next(in_folder.glob("stub_*.py")).stem


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def evaluate(*changes: str, methods: str = "dense:2,beta:2,sparse.json", prompts: str = "prompts.txt") -> int:
    model = str(jitaccel.embedded_model())
    arguments = ["--model", model, "--prompts", prompts, "--methods", methods, "--size", "64x96", "--device", "cpu"]
    return main(["eval", *arguments, "--max-sequence-length", "16", "--out", "out", *changes])


def test_model_is_evaluated_on_a_file_with_a_metric_of_ones_own(
    in_folder: Path, stub: str, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = f"psnr,{stub}:length,{stub}:furthest"
    assert evaluate("--metrics", metrics, "--guidance", "2.5") == 0
    rows = lines(in_folder / "out" / "rows.jsonl")
    names = ("dense:2", "beta:2", "sparse")
    assert [(row["method"], row["prompt_index"]) for row in rows] == [(name, k) for name in names for k in (0, 1)]
    first = rows[0]
    assert first["pixels"] == first["size"] == [64, 96] and first["guidance"] == 2.5 and first["dtype"] == "float32"
    assert first["prompt"] == "a red circle" and first["text_tokens"] == 16 and len(first["picture"]) == 64
    assert not {"claimed", "shown", "features", f"{stub}:length"} & first.keys()
    assert sum(shape[0] for _, shape in lines(in_folder / "asked.jsonl")) == 6
    results = lines(in_folder / "out" / "results.jsonl")
    assert len("a red circle") < results[0][f"{stub}:length"] < len("a red circle") + 1
    assert "psnr_db" not in results[0] and results[-1]["psnr_db"] > 5 and results[-1][f"{stub}:furthest"] > 1
    head, _, *cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert head[4:] == [
        "PSNR, dB", f"{stub}:length", f"{stub}:furthest", "seams", "against", f"{stub}:length more", "p |",
    ]  # fmt: skip
    assert cells[2][0] == "| sparse" and cells[2][-3] == "beta:2" and cells[0][4] == ""


def test_another_metric_asks_for_no_new_picture(
    in_folder: Path, stub: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--metrics", "", methods="dense:2,beta:2") == 0
    before = capsys.readouterr().out
    assert "PSNR" not in before and "against" not in before

    def refuse(*_: Any) -> None:
        raise AssertionError("no pipeline is needed")

    monkeypatch.setattr("jitaccel.loading.load_pipeline", refuse)
    for _ in range(2):
        assert evaluate("--metrics", f"ssim,{stub}:made", methods="dense:2,beta:2") == 0
    assert len(lines(in_folder / "asked.jsonl")) == 1  # the second run takes the numbers up
    assert f"{stub}:made" in lines(in_folder / "out" / "results.jsonl")[0]
    module = in_folder / f"{stub}.py"
    monkeypatch.delitem(__import__("sys").modules, stub)
    module.write_text(STUB.replace("/ 255", "/ 256"))
    assert evaluate("--metrics", f"{stub}:length", methods="dense:2,beta:2") == 0
    assert len(lines(in_folder / "asked.jsonl")) == 2  # an edited metric scores again


def test_rows_are_taken_up_where_model_call_and_prompt_are_the_same(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*changes: str) -> list[tuple[str, int]]:
        file = in_folder / "out" / "rows.jsonl"
        before = file.read_text().splitlines() if file.exists() else []
        assert evaluate(*changes, methods="dense:1") == 0
        return [json.loads(line)["prompt_index"] for line in file.read_text().splitlines()[len(before) :]]

    monkeypatch.setenv("JITACCEL_COMMIT", "one")
    assert made() == [0, 1] and made() == []
    (in_folder / "prompts.txt").write_text("a red circle\na green star\n")
    assert made() == [1]
    with (in_folder / "out" / "rows.jsonl").open("a") as file:
        file.write('{"method": "den')  # as a run leaves it that was killed
    assert made() == []
    assert made("--size", "64") == [0, 1] and made("--guidance", "2") == [0, 1]
    assert made("--dtype", "bfloat16") == [0, 1] and made("--seed", "1") == [0, 1]
    assert made() == [0, 1]  # their pictures were overwritten
    monkeypatch.setenv("JITACCEL_COMMIT", "two")
    assert made("--any-commit") == []
    assert {row["commit"] for row in lines(in_folder / "out" / "results.jsonl")} == {"one"}
    assert made() == [0, 1]
    assert {row["commit"] for row in lines(in_folder / "out" / "results.jsonl")} == {"two"}


def test_embedded_model_takes_a_file_without_its_judge(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompts", "prompts.txt", "--methods", "dense:1,dense:2", "--size", "64", "--device", "cpu"]
    assert main(["eval", *arguments, "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "detail, dB" in printed and not any(word in printed for word in ("attributes", "Frechet", "perceptual"))
    assert "shown" not in lines(in_folder / "out" / "rows.jsonl")[0]


def test_model_with_a_judge_is_evaluated_on_held_out_prompts(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.support import tiny

    tiny.pipeline().save_pretrained("model")
    drawn = np.random.default_rng(0).random((5, NUM_FEATURES), np.float32)
    Judge(JudgeNetwork(), drawn=drawn).save(Path("model", "judge"))
    arguments = ["--model", "model", "--prompts", "2", "--methods", "dense:2,beta:2", "--size", "64", "--device", "cpu"]
    assert main(["eval", *arguments, "--max-sequence-length", "8", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "attributes shown, %" in printed and "Frechet to data" in printed and "of 5 held-out drawings" in printed
    rows = lines(in_folder / "out" / "rows.jsonl")
    assert [row["prompt"] for row in rows[:2]] == [text for text, _ in held_out(2)]
    assert [row["claimed"] for row in rows[:2]] == [len(claims) for _, claims in held_out(2)]
    assert all(len(row["features"]) == NUM_FEATURES and row["judge"] for row in rows)


def test_missing_packages_are_named_before_anything_is_made(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ImageReward", "piq", "hpsv2", "lpips"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    assert evaluate("--metrics", "imagereward,clip-iqa,hpsv2,clip,lpips,psnr") == 2
    error = capsys.readouterr().err
    for words in ("image-reward", "piq", "hpsv2x", "lpips: lpips is missing", 'pip install "jitaccel[eval]"'):
        assert words in error
    assert len(error.splitlines()) == 1 and not (in_folder / "out").exists()


def test_metrics_are_names_or_ones_own(in_folder: Path, stub: str) -> None:
    psnr, own = parse_metrics(f"psnr, {stub}:furthest", "cpu")
    assert (psnr.name, psnr.needs_reference, psnr.judges_prompt) == ("psnr_db", True, False)
    assert own.needs_reference and own.name == f"{stub}:furthest"
    for wrong, words in {
        "pnsr": 'did you mean "psnr"',
        "fid": "package.module:attribute",
        "psnr,psnr": "must all be different",
        f"{stub}:made,{stub}:nothing": "has no attribute 'nothing'",
        "no_such_module:score": "PYTHONPATH",
        f"{stub}:STUB": "has no attribute",
        "json:decoder": "which is module",
    }.items():
        with pytest.raises(CommandError, match=words):
            parse_metrics(wrong, "cpu")


def test_wrong_numbers_of_a_metric_are_told(in_folder: Path, stub: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--metrics", f"{stub}:wrong", methods="dense:1") == 2
    error = capsys.readouterr().err
    assert f"{stub}:wrong: score must return 2 numbers" in error and "are kept" in error
    assert len(lines(in_folder / "out" / "rows.jsonl")) == 2


def test_prompts_are_lines_or_fields_of_json(in_folder: Path) -> None:
    (in_folder / "geneval.jsonl").write_text('{"tag": "x", "prompt": "a bench"}\n\n{"prompt": " two é cats "}\n')
    assert [each.text for each in read_prompts("geneval.jsonl", is_judged=False)] == ["a bench", "two é cats"]
    texts = read_prompts("prompts.txt", is_judged=True)
    assert [each.text for each in texts] == ["a red circle", "a blue square on the left"]
    assert all(each.claims is None for each in texts) and read_prompts("2", is_judged=True)[0].claims


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt": 2}\n', "line 2 of a.jsonl"),
        ("a.jsonl", b'{"prompt": "one"}\n"two"\n', "line 2 of a.jsonl"),
        ("a.jsonl", b'{"prompt": "one"}\n\n{"prompt"\n', "must be JSON, got line 3"),
        ("a.txt", b"one\ntwo\n\xff\n", "must be UTF-8, got line 3"),
        ("a.txt", b"one\n\n", "at least 2 prompts, got 1"),
        ("a.csv", b"one\ntwo\n", "must be a .txt file"),
        ("missing.txt", None, "no such file"),
        ("48", None, "must be a file for a model without a judge"),
    ],
)
def test_prompts_that_are_none_are_told_with_their_line(
    in_folder: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (in_folder / name).write_bytes(content)
    with pytest.raises(CommandError, match=words):
        read_prompts(name, is_judged=False)


def test_bad_arguments_are_told_in_one_line(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: Callable[[], str] = lambda: capsys.readouterr().err  # noqa: E731
    for changes, words in (
        (["--size", "64x"], "--size must be HxW in pixels, got '64x'"),
        (["--size", "0"], "--size must be of sides in 1..16384 pixels, got 0x0"),
        (
            ["--batch-size", "0", "--seed", "-1"],
            "--batch-size must be in 1..1024, got 0; --seed must be in 0..2**63 - 1, got -1",
        ),
        (["--max-sequence-length", "0"], "--max-sequence-length must be in 1..512, got 0"),
        (["--size", "60x64"], "--size must be of multiples of 8 pixels"),
        (["--model", "nowhere"], "--model must be an existing folder or a hub id"),
    ):
        assert evaluate(*changes) == 2
        lines = [line for line in told().splitlines() if line.startswith("jitaccel")]  # without output of loading
        assert len(lines) == 1 and words in lines[0]
