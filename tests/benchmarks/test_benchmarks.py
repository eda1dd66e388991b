"""The benchmark command: its registry, its rows, and its reports of cases that it cannot measure."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import kernels
from benchmarks.registry import Options, find_cases, percentiles
from benchmarks.table import auto as auto_table
from jitaccel import __version__, provenance
from tests.support.benchmarks import TINY

ROOT = Path(__file__).parents[2]


def test_cases_are_found_by_their_modules() -> None:
    pytest.importorskip("diffusers")
    found = {(case.group, case.size) for case in find_cases()}
    assert {("denoise", "small"), ("denoise", "large"), ("denoise", "flux")} <= found


@pytest.mark.parametrize("distilled", [True, False], ids=["distilled", "undistilled"])
def test_every_codebase_makes_the_pipelines_picture(distilled: bool) -> None:
    pytest.importorskip("diffusers")
    from benchmarks.checkout import codebases
    from benchmarks.pipelines import Subject, random_subject

    def small(options: Options) -> Subject:
        model = {**TINY, "guidance_embeds": distilled}
        return random_subject(model, options.device, torch.float32, (16, 16), options.seed, text_tokens=8)

    options = Options(device=torch.device("cpu"), repeat=2, seed=0)
    rows = [row.fields for row in codebases.measure(options, small, timed_steps=2)]
    assert [row["way"] for row in rows] == [*codebases.WAYS]
    assert all(row["difference_to_pipeline"] < 1e-4 and row["denoise_median_s"] > 0 for row in rows)
    assert rows[0]["speedup_over_pipelines"] == 1.0 and rows[0]["difference_to_pipeline"] == 0.0
    assert "comfy" not in sys.modules


def test_auto_rows_hold_what_was_predicted_and_what_was_measured() -> None:
    pytest.importorskip("diffusers")
    from benchmarks.cases import auto
    from benchmarks.pipelines import random_subject

    options = Options(device=torch.device("cpu"), repeat=1, seed=0)
    subject = random_subject(TINY, options.device, torch.float32, (16, 16), 0, text_tokens=8)
    (row,) = auto.measure(subject, options, targets=(2.0,))
    fields = row.fields
    assert fields["predicted_speedup"] >= 2.0 and fields["dense_50_s"] > 0 and fields["method"] in row.line
    expected = 1000.0 * fields["denoise_median_s"] / fields["predicted_ms"]
    assert fields["measured_over_predicted"] == pytest.approx(expected, abs=0.01)
    line = auto_table([{**fields, "benchmark": "auto", "device": "a", "threads": 2, "date": "d", "commit": "c"}])
    assert "| 16x16 | 2x |" in line and f"{fields['predicted_speedup']:.2f}x" in line


def test_percentiles_are_interpolated() -> None:
    assert percentiles([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((3.0, 1.8, 4.2))
    assert percentiles([2.0]) == (2.0, 2.0, 2.0)


def test_unknown_case_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["denoise", "--size", "enormous"]) == 2
    assert "denoise --size small" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to measure on")
def test_case_that_needs_cuda_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["denoise", "--size", "flux"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert "torch" in first
    assert rest[-1] == "not measured: no CUDA device"


def test_rows_name_units_origin_and_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    from benchmarks.cases import denoise
    from benchmarks.pipelines import Subject, random_subject

    def small(options: Options) -> Subject:
        return random_subject(TINY, options.device, torch.float32, (16, 16), options.seed, text_tokens=8)

    monkeypatch.setattr(denoise, "CASES", (_case(denoise, small),))
    file = tmp_path / "new" / "rows.jsonl"
    assert main(["denoise", "--repeat", "2", "--device", "cpu", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["dense", "control", "4x", "7x"]
    assert {"device", "torch", "commit", "dtype", "grid", "seed", "denoise_median_s", "denoise_p20_s"} <= rows[0].keys()
    dense, control, _, seven = rows
    assert (dense["steps"], dense["timed_steps"]) == (50, 5)
    assert dense["cost_dense_steps"] == 50.0
    assert control["cost_dense_steps"] == round(seven["cost_dense_steps"])
    assert 0.0 < seven["outside_share_of_sparse_steps"] < 1.0 and dense["outside_share_of_sparse_steps"] is None
    assert seven["speedup_over_flop_ratio_to_dense"] > 0
    assert "outside" in capsys.readouterr().out


def _case(module: Any, make: Any) -> Any:
    from benchmarks.registry import Case

    run = functools.partial(module._run, make=make, timed_dense_steps=5)
    return Case(group="denoise", size="small", name="tiny", run=run, why_not=lambda options: None)


def test_random_transformer_is_the_same_for_the_same_seed_and_leaves_the_global_generator_alone() -> None:
    pytest.importorskip("diffusers")
    from benchmarks.pipelines import random_transformer

    before = torch.get_rng_state()
    first, second = (random_transformer(TINY, torch.device("cpu"), torch.bfloat16, 3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) and a.dtype == torch.bfloat16 for a, b in pairs)


def test_provenance_names_device_versions_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = provenance.provenance()
    assert origin["torch"] == torch.__version__
    assert all(str(origin[name]) for name in ("device", "commit", "python", "diffusers"))
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() == f"installed {__version__}"
    monkeypatch.setenv("JITACCEL_COMMIT", "0123456789ab")
    assert provenance.commit() == "0123456789ab"


def test_released_operations_compute_what_the_operators_do() -> None:
    grid = (10, 12)
    options = Options(device=torch.device("cpu"), repeat=1, seed=0)
    x = kernels.make_inputs(grid, 16, 0.4, torch.float32, options)
    places = torch.stack(torch.unravel_index(torch.arange(x.state.shape[1]), grid), dim=-1)
    maps = (x.nearest[0], kernels.released_nearest(x))
    ours, released = ((places - places[x.anchors[0, at]]).square().sum(dim=1) for at in maps)
    assert torch.equal(ours, released)  # of equally near ones the matrix takes any
    importance = kernels.released_importance(x)
    torch.testing.assert_close(importance, x.importance, rtol=1e-4, atol=1e-5)
    assert set(kernels.released_activate(x).tolist()) == set(x.tokens[0].tolist())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_memory_of_outputs_is_kept_while_operators_are_measured() -> None:
    program = """
import torch
from benchmarks.cases.memory import kept_memory, page_faults

def call():
    torch.empty(40 * 2**20, dtype=torch.uint8).fill_(1)

print(page_faults(call))
with kept_memory():
    for _ in range(10):
        call()
    print(page_faults(call))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    without, kept = map(float, done.stdout.split())
    assert without > 1000 and kept < 10


def test_kernels_are_measured_beside_the_released_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(kernels.GRIDS, "32", (6, 8))
    monkeypatch.setattr(kernels, "CHANNELS", (8,))
    monkeypatch.setattr(kernels, "DENSITIES", (0.4,))
    monkeypatch.setattr(kernels, "_compiled_seconds", lambda *_: None)
    assert main(["kernels", "--size", "32", "--repeat", "2", "--json", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["operator"] for row in rows] == [kernel.name for kernel in kernels.KERNELS]
    for row in rows:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["memory_limit_ms"] > 0
        lifts = row["operator"] == "lift"
        assert (row["plan_share_ms"] > 0) == lifts
        if row["released_ms"] is not None:
            charged = row["median_ms"] + row["plan_share_ms"]
            assert row["speedup_to_released"] == pytest.approx(row["released_ms"] / charged, rel=1e-3)


def test_packing_rows_compare_all_ways_on_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from benchmarks.cases import packing
    from benchmarks.pipelines import random_transformer
    from benchmarks.registry import Case

    def small(options: Options) -> Any:
        return random_transformer(TINY, options.device, torch.float32, options.seed)

    sizes = {"equal": [(8, 8)], "mixed": [(4, 4), (8, 8)]}
    run = functools.partial(packing.measure, make=small, sizes=sizes, text_tokens=4)
    monkeypatch.setattr(packing, "BATCHES", (1, 3))
    case = Case(group="packing", size="tiny", name="tiny", run=run, why_not=lambda options: None)
    monkeypatch.setattr(packing, "CASES", (case,))
    file = tmp_path / "rows.jsonl"
    assert main(["packing", "--repeat", "2", "--device", "cpu", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    seen = [(row["mix"], row["batch"], row["way"]) for row in rows]
    ways = ("loop", "padded", "packed sdpa")
    assert seen == [(mix, n, way) for mix, n in (("equal", 1), ("equal", 3), ("mixed", 3)) for way in ways]
    assert [row["tokens"] for row in rows[-3:]] == [2 * (5 + 4) + 20 + 4] * 3
    assert all(row["speedup_to_loop"] == 1.0 for row in rows if row["way"] == "loop")
    assert {"tokens_per_s", "gflop", "peak_mib_over_before", "median_s", "commit"} <= rows[0].keys()


@torch.no_grad()
def test_packing_compares_ways_that_give_the_same_velocity() -> None:
    pytest.importorskip("diffusers")
    from benchmarks.cases import packing
    from benchmarks.pipelines import random_transformer
    from jitaccel.execution.attention.choice import choose_backend

    model = random_transformer(TINY, torch.device("cpu"), torch.float32, 0)
    images = packing.make_images(model, [(4, 4), (8, 8)], 4, seed=0)
    backend = choose_backend("sdpa", torch.device("cpu"), torch.float32, 16)
    packed = packing.packed(model, images, backend)()
    padded = packing.padded(model, images)()
    expected = packing.loop(model, images)()
    torch.testing.assert_close(packed, torch.cat(expected))
    torch.testing.assert_close(torch.cat([padded[:5], padded[20:]]), torch.cat(expected))


def _timed(ms: float) -> Any:
    """Returns a case of two rows that take so long."""
    from benchmarks.registry import Case, Measurement

    def run(options: Options) -> Any:
        for operator in ("lift", "step"):
            yield Measurement(line=operator, fields={"operator": operator, "grid": [8, 8], "median_ms": ms})

    return Case(group="denoise", size="tiny", name="timed", run=run, why_not=lambda options: None)


def test_rows_are_compared_with_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.cases import denoise

    file, asked = tmp_path / "rows.jsonl", ["denoise", "--device", "cpu"]
    monkeypatch.setattr(denoise, "CASES", (_timed(2.0),))
    assert main([*asked, "--json", str(file)]) == 0
    monkeypatch.setattr(denoise, "CASES", (_timed(2.5),))
    capsys.readouterr()
    assert main([*asked, "--compare", str(file)]) == 0
    assert "lift  [1.250x of earlier]" in (out := capsys.readouterr().out) and "2 rows compared" in out
    assert main([*asked, "--compare", str(file), "--fail-above", "1.3"]) == 0
    assert main([*asked, "--compare", str(file), "--fail-above", "1.2"]) == 1
    assert "2 times are above 1.2x" in capsys.readouterr().err


def test_rows_of_another_device_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.cases import denoise

    file, asked = tmp_path / "rows.jsonl", ["denoise", "--device", "cpu"]
    monkeypatch.setattr(denoise, "CASES", (_timed(2.0),))
    assert main([*asked, "--json", str(file)]) == 0
    rows = [{**json.loads(line), "device": "another"} for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert main([*asked, "--compare", str(file), "--fail-above", "0.1"]) == 0
    assert "0 rows compared" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "no json", "{}", ""])
def test_file_that_holds_no_rows_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_text(content)
    assert main(["kernels", "--size", "32", "--compare", str(file)]) == 2
    captured = capsys.readouterr()
    assert "--compare must" in captured.err and captured.out == ""
    assert main(["kernels", "--size", "32", "--fail-above", "1.1"]) == 2


def test_command_of_the_package_is_the_same_but_for_cases_of_a_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    from jitaccel import cli

    assert main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert cli.main(["bench", "--list"]) == 0
    installed = capsys.readouterr().out.splitlines()
    assert installed == [line for line in listed if not line.startswith(("codebases", "serving"))]
    assert len(installed) < len(listed) and any(line.startswith("startup") for line in installed)
    assert cli.main(["bench", "nothing"]) == 2


def test_startup_rows_are_the_parts_of_a_fresh_process(tmp_path: Path) -> None:
    from benchmarks.cases import startup

    if startup.no_embedded(Options(device=torch.device("cpu"), repeat=1, seed=0)):
        pytest.skip("no embedded model")
    file = tmp_path / "rows.jsonl"
    chosen = ["--size", "small", "--only", "fresh processes"]
    assert main(["startup", *chosen, "--repeat", "1", "--device", "cpu", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["what"] for row in rows][0::5] == ["import jitaccel", "second picture"] and len(rows) == 6
    assert all(row["median_s"] >= 0 for row in rows)


def test_startup_compiles_with_a_cold_cache_and_then_a_warm_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.cases import startup

    caches: list[str] = []

    def run(script: str, *arguments: str, **environment: str) -> float:
        assert "captures == handle.config.num_stages" in script and arguments == ("cpu", "small")
        caches.append(environment["TORCHINDUCTOR_CACHE_DIR"])
        return float(len(caches))

    monkeypatch.setattr(startup, "_json", run)
    cold, warm = startup.measure_compilation(Options(device=torch.device("cpu"), repeat=3, seed=0), "small")
    assert len(caches) == 4 and len(set(caches)) == 1 and not Path(caches[0]).exists()
    assert [row.fields["repeats"] for row in (cold, warm)] == [1, 3]
    assert (cold.fields["median_s"], warm.fields["median_s"]) == (1.0, 3.0) and "cold" in cold.line


def test_script_that_fails_says_why() -> None:
    from benchmarks.cases import startup

    with pytest.raises(RuntimeError, match="ValueError: no such device"):
        startup._json("raise ValueError('no such device')")
    with pytest.raises(RuntimeError, match="the process ended with 3"):
        startup._json("import sys; sys.exit(3)")


def test_no_case_is_begun_after_the_time_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.__main__.time.monotonic", iter(range(0, 10_000, 100)).__next__)
    file = tmp_path / "rows.jsonl"
    assert main(["kernels", "--device", "cpu", "--json", str(file), "--resume", "--within", "50"]) == 0
    assert "5 cases were not begun within 50 s; --resume continues" in capsys.readouterr().out and not file.exists()


def test_resume_needs_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--resume"]) == 2 and "--resume must come with --json" in capsys.readouterr().err
