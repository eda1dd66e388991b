"""The record, which runs one generation in every way."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.registry import find_cases
from jitaccel import PRESETS
from tests.support.benchmarks import TINY


def _record(variant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict[str, Any]]:
    """Runs one variant on a tiny random pipeline through the command, and returns the file's rows."""
    from benchmarks.cases import record

    make = functools.partial(record.Cached(), model=TINY, grid=(8, 8), text_tokens=8)
    case = record._case("small", "tiny", variant, make, (8, 8), lambda options: None)
    monkeypatch.setattr(record, "CASES", (case,))
    file = tmp_path / "rows.jsonl"
    assert main(["record", "--repeat", "2", "--device", "cpu", "--json", str(file), *arguments]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_record_has_every_way_at_two_sizes() -> None:
    pytest.importorskip("diffusers")
    names = [case.name for case in find_cases() if (case.group, case.size) == ("record", "flux")]
    assert len(names) == len(set(names)) == 30
    for size in ("1024x1024", "2048x2048"):
        for way in ("eager", "packed", "compiled", "captured", "float8"):
            assert sum(f"{size}: 7x, {way}" in name for name in names) == 1
        assert sum(f"{size}: dense, " in name for name in names) == 5


@pytest.mark.parametrize(("method", "way", "steps"), [("dense", "eager", 3), ("7x", "packed", 0), ("7x", "eager", 0)])
def test_record_rows_hold_what_was_measured(
    method: str, way: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    from benchmarks.cases.record import Contender

    (row,) = _record(Contender(method=method, way=way, steps=steps), tmp_path, monkeypatch)
    assert (row["method"], row["way"], row["steps"]) == (method, way, steps or PRESETS[method].steps)
    assert row["denoise_p20_s"] <= row["denoise_median_s"] <= row["denoise_p80_s"]
    assert row["gflop"] > 0 and row["peak_memory_mib"] is None and row["compiled"] is None
    parts = ("outside_share_of_sparse_steps", "outside_median_s", "network_median_s")
    assert all((row[name] is None) == (method == "dense") for name in parts)
    assert row["peak_reserved_mib"] is None and row["first_s"] > 0


def test_embedded_model_has_every_way_but_float8() -> None:
    pytest.importorskip("diffusers")
    names = [case.name for case in find_cases() if (case.group, case.size) == ("record", "small")]
    assert len(names) == 13 and not any("float8" in name for name in names)


@pytest.mark.parametrize("way", ["eager", "packed", "compiled", "captured", "float8"])
@pytest.mark.parametrize("method", ["dense", "4x"])
def test_record_leaves_the_pipeline_as_it_was(method: str, way: str) -> None:
    pytest.importorskip("diffusers")
    from benchmarks.cases.record import Contender, applied
    from benchmarks.pipelines import random_pipeline

    pipe = random_pipeline(TINY, torch.device("cpu"), torch.bfloat16, 0)
    before = dict(vars(pipe.transformer)), dict(vars(pipe.scheduler)), pipe.transformer
    with contextlib.suppress(KeyboardInterrupt), applied(pipe, Contender(method=method, way=way, steps=5)) as handle:
        assert (handle is None) == (method == "dense" and way in ("eager", "compiled"))
        raise KeyboardInterrupt
    assert (dict(vars(pipe.transformer)), dict(vars(pipe.scheduler)), pipe.transformer) == before


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="torch's inductor does not quote its own path to the C++ compiler")
def test_record_captures_dense_steps_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from benchmarks.cases.record import Contender

    (row,) = _record(Contender(method="dense", way="captured", steps=2), tmp_path, monkeypatch)
    assert row["compiled"] == {
        "signatures": 1, "graphs": 1, "calls": 6, "eager_calls": 0, "captures": 1, "replays": 5, "dropped": 0,
        "what": "stages",
    }  # fmt: skip
    (_, row) = _record(Contender(method="dense", way="compiled", steps=2), tmp_path, monkeypatch)
    assert row["compiled"] is None and "error" not in row


def test_record_keeps_nothing_of_earlier_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    import jitaccel
    from benchmarks.cases import record
    from jitaccel.execution.graphs import Replayed

    apply = functools.partial(jitaccel.apply, compile={"graphs": True, "backend": "eager"})
    monkeypatch.setattr(jitaccel, "apply", lambda *args, **settings: apply(*args))
    (row,) = _record(record.Contender(method="7x", way="captured"), tmp_path, monkeypatch)
    stages, steps = PRESETS["7x"].num_stages, PRESETS["7x"].steps
    compiled = row["compiled"]
    assert (compiled["captures"], compiled["replays"], compiled["eager_calls"]) == (stages, 3 * steps - stages, 0)
    record.forget_earlier_cases(torch.device("cpu"))
    assert not [x for x in gc.get_objects() if type(x) is Replayed]


def test_case_that_fails_is_a_row_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from benchmarks.cases import record

    contender = record.Contender(method="7x", way="packed")
    with monkeypatch.context() as patched:
        patched.setattr(record, "timed", lambda *_, **__: 1 / 0)
        (row,) = _record(contender, tmp_path, monkeypatch)
        assert row["error"] == "ZeroDivisionError: division by zero"
    _, row, closing = _record(contender, tmp_path, monkeypatch, "--resume")
    assert "error" not in row and closing["is_closing"] and closing["case"] == row["case"]
    assert len(_record(contender, tmp_path, monkeypatch, "--resume")) == 3  # measured now
