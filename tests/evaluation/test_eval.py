"""`jitaccel eval`: rows that can be resumed, and a table that agrees with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest

from jitaccel import PRESETS
from jitaccel.cli import main
from jitaccel.errors import CommandError
from jitaccel.evaluation.eval_table import paired, table
from jitaccel.evaluation.methods import parse_methods
from jitaccel.evaluation.quality.summary import summary
from jitaccel.evaluation.scenes.judge import NUM_FEATURES
from jitaccel.evaluation.scoring import parse_metrics

pytest.importorskip("diffusers")
METHODS = "dense:3,beta:2,sparse.json"


def evaluate(folder: Path, prompts: int = 2, methods: str = METHODS) -> list[dict[str, Any]]:
    arguments = ["eval", "--prompts", str(prompts), "--methods", methods, "--out", str(folder), "--device", "cpu"]
    assert main(arguments) == 0
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small sparse method in it: two stages, four steps."""
    monkeypatch.chdir(tmp_path)
    config = {"densities": [0.4, 1.0], "boundaries": [0.5, 1.0], "steps": 4}
    (tmp_path / "sparse.json").write_text(json.dumps(config))
    return tmp_path


def test_rows_pictures_and_table_of_a_run_that_is_taken_up(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = evaluate(in_folder / "out")
    printed = capsys.readouterr().out
    assert [(row["method"], row["prompt_index"]) for row in rows] == [
        (name, k) for name in ("dense:3", "beta:2", "sparse") for k in (0, 1)
    ]
    assert len([*(in_folder / "out" / "pictures").rglob("*.png")]) == 6
    dense, _, beta, _, sparse, _ = rows
    assert dense["seam"] is None and beta["seam"] is None and sparse["seam"] > 0
    assert beta["gflop"] == pytest.approx(2 / 3 * dense["gflop"]) and sparse["gflop"] < 4 / 3 * dense["gflop"]
    assert len(dense["features"]) == NUM_FEATURES and {"commit", "device", "torch"} <= dense.keys()
    assert (in_folder / "out" / "table.md").read_text() in printed
    lines = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines[2:]] == ["| dense:3", "| beta:2", "| sparse"]
    assert lines[4][-3] == "beta:2" and lines[3][-3] == ""
    dense, *_, sparse = [json.loads(line) for line in (in_folder / "out" / "results.jsonl").read_text().splitlines()]
    assert "psnr_db" not in dense and 0 < sparse["ssim"] < 1 and 5 < sparse["psnr_db"] < 60
    assert 0 < sparse["perceptual"] < 2 and sparse["features"] == rows[-1]["features"]
    again = evaluate(in_folder / "out", prompts=3)
    assert again[:6] == rows and [row["prompt_index"] for row in again[6:]] == [2, 2, 2]
    # Rows that were made before models could be chosen say less.
    new = {"model", "dtype", "guidance", "text_tokens", "size", "pixels", "picture", "judge"}
    older = [{name: value for name, value in row.items() if name not in new} for row in again]
    for row in older:  # nor do those from before a field of JiTConfig existed
        if row["config"] and "solver" in row["config"]:
            row["config"] = {name: value for name, value in row["config"].items() if name not in ("solver", "noise")}
    (in_folder / "out" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in older))
    assert evaluate(in_folder / "out", prompts=3) == older


def test_rows_of_other_settings_are_made_anew(in_folder: Path) -> None:
    first = evaluate(in_folder / "out", methods="dense:2,sparse.json")
    config = {"densities": [0.6, 1.0], "boundaries": [0.5, 1.0], "steps": 4}
    (in_folder / "sparse.json").write_text(json.dumps(config))
    (in_folder / "out" / "pictures" / "dense-2" / "0001.png").unlink()
    added = evaluate(in_folder / "out", methods="dense:2,sparse.json")[len(first) :]
    assert [(row["method"], row["prompt_index"]) for row in added] == [("dense:2", 1), ("sparse", 0), ("sparse", 1)]
    assert added[0]["features"] == pytest.approx(first[1]["features"], abs=1e-3)
    assert added[1]["gflop"] > first[2]["gflop"]


def row(method: str, prompt: int, shown: int, gflop: float, seam: float | None = None) -> dict[str, Any]:
    densities = [1.0] if seam is None else [0.3, 1.0]
    rng = np.random.default_rng([prompt, len(method)])
    return {
        "method": method, "prompt_index": prompt, "steps": 10, "claimed": 5, "shown": shown, "gflop": gflop,
        "denoise_s": 1.0, "features": rng.standard_normal(4).tolist(), "config": {"densities": densities}, "seam": seam,
        "psnr_db": 20.0, "ssim": 0.5, "perceptual": 0.1, "spectrum_db": -1.0,
    }  # fmt: skip


def test_table_compares_with_the_dense_method_of_the_nearest_cost() -> None:
    rows = [row("dense:50", k, 5, 100.0) for k in range(40)]
    rows += [row("beta:6", k, 3, 12.0) for k in range(40)] + [row("beta:11", k, 4, 22.0) for k in range(40)]
    rows += [row("7x", k, 4, 13.0, seam=1.2) for k in range(40)]
    data = np.random.default_rng(0).standard_normal((60, 4))
    records = summary(rows, ["dense:50", "beta:6", "beta:11", "7x"], data=data)
    text = table(rows, records, parse_metrics("psnr,ssim", "cpu"), len(data))
    cells = {line.split(" | ")[0][2:]: line.rstrip(" |\n").split(" | ") for line in text.splitlines() if "x" in line}
    seven = cells["7x"]
    assert seven[2] == "1.30" and seven[4] == "80.0 (80.0 to 80.0)"
    assert seven[-3:] == ["beta:6", "20.0 (20.0 to 20.0)", "< 0.001"]
    assert "Means over 40 prompts" in text and "Reference: dense:50" in text
    pairs = paired(rows, ["dense:50", "beta:6", "beta:11", "7x"])
    assert {name: [*some] for name, some in pairs.items()} == {
        "dense:50": [], "beta:6": ["dense:50"], "beta:11": ["dense:50"], "7x": ["dense:50", "beta:6"]
    }  # fmt: skip
    assert pairs["7x"]["beta:6"] == {**dict.fromkeys(("value", "low", "high"), pytest.approx(0.2)), "p": ANY}
    assert pairs["7x"]["dense:50"]["value"] == pytest.approx(-0.2) and 0.0 < pairs["7x"]["beta:6"]["p"] < 0.001
    assert paired([{**each, "shown": None} for each in rows], ["dense:50", "7x"]) == {}


def test_methods_are_presets_dense_steps_or_files(in_folder: Path) -> None:
    dense, beta, seven, own = parse_methods("dense:50, beta:7,7x,sparse.json")
    assert (dense.config.schedule, dense.steps, beta.config.schedule, beta.steps) == ("native", 50, "beta", 7)
    assert beta.config.densities == (1.0,) and seven.config is PRESETS["7x"] and own.name == "sparse"
    for wrong, words in {
        "8x": "got '8x'",
        "dense:0": "got 'dense:0'",
        "dense:99999999999999999999": "--methods .*got 'dense:99999999999999999999': .*steps must be",
        f"dense:{'9' * 5000}": "--methods must list methods that can run",
        f"{'a' * 5000}.json": "--methods must list",
        "none.json": "got 'none.json'",
        "7x,7x": "must all be different",
    }.items():
        with pytest.raises(CommandError, match=words):
            parse_methods(wrong)


def test_bad_arguments_are_told_in_one_line(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_folder / "file").touch()
    for arguments, words in (
        (["--prompts", "1"], "at least 2 and at most 10000, got 1"),
        (["--prompts", "a" * 5000], "--prompts must be a number or a file"),
        (["--model", "a" * 5000], "--prompts must be a file for a model without a judge"),
        (["--out", "file"], "must be a folder"),
        (["--methods", "fast"], "got 'fast'"),
    ):
        assert main(["eval", *arguments]) == 2
        assert words in capsys.readouterr().err
