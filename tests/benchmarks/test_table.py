"""The README's tables are made from rows only: the newest of each kind, with its date and commit."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from benchmarks.table import README, RESULTS, TABLES, filled, main, read_results
from jitaccel import PRESETS, JiTConfig
from jitaccel.evaluation.quality.rows import method_kind, settings_as_now

RECORD: dict[str, Any] = {
    "benchmark": "record",
    "method": "dense",
    "way": "eager",
    "grid": [64, 64],
    "batch": 1,
    "steps": 50,
    "dtype": "bfloat16",
    "seed": 0,
    "denoise_median_s": 8.0,
    "denoise_p20_s": 7.9,
    "denoise_p80_s": 8.1,
    "first_over_later_s": 0.25,
    "outside_share_of_sparse_steps": None,
    "gflop": 7000.0,
    "tflop_per_s": 437.25,
    "peak_memory_mib": 30000.4,
    "device": "NVIDIA H200",
    "threads": 16,
    "torch": "2.11.0+cu130",
    "commit": "abc",
}


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(name: str, **changed: Any) -> dict[str, Any]:
    return {**RECORD, "case": f"FLUX, 1024x1024: {name}", **changed}


@pytest.mark.parametrize("field", [field for field in fields(JiTConfig) if field.default is not MISSING])
@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config.num_stages > 1])
def test_row_written_before_a_field_existed_reads_as_its_default(name: str, field: Any) -> None:
    config = PRESETS[name].to_dict()
    old = {key: value for key, value in config.items() if key != field.name}
    assert settings_as_now(config) == config
    default = json.loads(json.dumps(field.default))
    assert (settings_as_now(old) == config) == (config[field.name] == default)
    assert method_kind({"method": name, "config": old}) == "sparse"


@pytest.mark.parametrize("settings", [{}, {"rival": "cache", "threshold": 0.1}])
def test_settings_that_are_no_configuration_stay_as_they_are(settings: dict[str, Any]) -> None:
    assert settings_as_now(settings) == settings


def test_every_preset_whose_row_exists_is_shown_as_measured() -> None:
    rows = read_results(RESULTS)
    of = [row for row in rows if row["benchmark"] in ("lab", "quality summary") and row["method"] in PRESETS]
    measured = {row["method"] for row in of if settings_as_now(row["config"]) == PRESETS[row["method"]].to_dict()}
    cards = TABLES["presets"](rows).split("### ")[1:]
    shown = {card.split("`")[1] for card in cards if "Not measured on the embedded model" not in card}
    assert shown == measured


def summary(method: str, side: int, **changed: Any) -> dict[str, Any]:
    share = {"value": 0.9, "low": 0.85, "high": 0.95}
    paired = {"dense:50": {"value": -0.02, "low": -0.05, "high": 0.01, "p": 0.21}} if method != "dense:50" else {}
    return {
        "benchmark": "quality summary", "method": method, "model": "embedded", "pixels": [side, side], "prompts": 9,
        "cost_dense_steps": 7.0, "gflop": 7.0, "config": PRESETS["7x"].to_dict(), "weights": "0" * 64, "seed": 0,
        "qualities": {"attributes": share, "frechet_to_data": {"value": 1.0, "low": 1.5, "high": 2.0}},
        "paired": paired, "device": "AMD EPYC", "dtype": "bfloat16", "commit": "abc", **changed,
    }  # fmt: skip


def test_evaluations_have_a_table_for_each_size_and_paired_differences(tmp_path: Path) -> None:
    write(tmp_path, "quality-2026-12-01.jsonl", *(summary(m, side) for side in (128, 256) for m in ("dense:50", "7x")))
    rows = read_results(tmp_path)
    large, small = TABLES["quality"](rows).split("\n\n1")
    assert large.startswith("256x256 pixels, 32x32 tokens (9 held-out prompts") and small.startswith("28x128 pixels")
    seven = next(line for line in large.splitlines() if line.startswith("| `7x`")).split(" | ")
    assert seven[1:5] == ["7.00", "90.0 (85.0 to 95.0)", "", "1.00"]
    assert seven[-2:] == ["`dense:50` by -2.0 (-5.0 to 1.0)", "0.210 |"]
    card = next(card for card in TABLES["presets"](rows).split("### ") if card.startswith("`7x`"))
    assert "| `7x` | 7.00 | 90.0 (85.0 to 95.0) |" in card and "9 held-out prompts" in card
    write(tmp_path, "quality-2026-12-02.jsonl", summary("4x", 256, prompts=10))
    more = TABLES["quality"](read_results(tmp_path))
    assert more.startswith("256x256 pixels, 32x32 tokens (10 held-out") and more.endswith(TABLES["quality"](rows))
    write(tmp_path, "quality-2026-12-03.jsonl", summary("10x", 256, weights="1" * 64))
    with pytest.raises(ValueError, match="256 pixels must be of the same weights"):
        TABLES["quality"](read_results(tmp_path))


def test_record_divides_by_dense_run_plainly_and_alike(tmp_path: Path) -> None:
    sparse = {"method": "7x", "steps": 11, "way": "captured", "gflop": 1000.0, "outside_share_of_sparse_steps": 0.004}
    write(
        tmp_path,
        "record-h200-2026-12-01.jsonl",
        record("dense, eager"),
        record("dense, captured", way="captured", denoise_median_s=6.0),
        record("7x, captured", **sparse, denoise_median_s=1.0, denoise_p20_s=0.9, denoise_p80_s=1.1),
        record("7x, float8", error="OutOfMemoryError: no memory"),
    )
    lines = [row.split(" | ") for row in TABLES["record"](read_results(tmp_path)).splitlines()[4:]]
    assert [line[:7] for line in lines] == [
        ["| dense", "eager", "50", "8.00 (7.90 to 8.10)", "1.00x", "1.00x", "1.00x"],
        ["| dense", "captured", "50", "6.00 (7.90 to 8.10)", "1.33x", "1.00x", "1.00x"],
        ["| 7x", "captured", "11", "1.00 (0.90 to 1.10)", "8.00x", "6.00x", "7.00x"],
    ]
    assert [line[7:] for line in lines] == [
        ["437", outside, "30,000", "0.2", "2026-12-01, abc |"] for outside in ("", "", "0.4")
    ]


def test_rows_of_another_commit_or_torch_are_not_divided_by(tmp_path: Path) -> None:
    write(
        tmp_path,
        "record-h200-2026-12-01.jsonl",
        record("dense, eager"),
        record("7x, packed", method="7x", steps=11, way="packed", commit="later"),
        record("4x, packed", method="4x", steps=18, way="packed", torch="2.12.0"),
    )
    _, *sparse = [row.split(" | ") for row in TABLES["record"](read_results(tmp_path)).splitlines()[4:]]
    assert [line[4:7] for line in sparse] == [["", "", ""]] * 2


def test_line_of_several_rows_names_every_origin(tmp_path: Path) -> None:
    row = {"benchmark": "packing", "case": "tiny, 8x8", "mix": "equal", "way": "packed sdpa", "tokens_per_s": 1200.0}
    row |= {"device": "CPU", "threads": 2, "speedup_to_loop": 1.5}
    for date, batch in (("2026-12-01", 1), ("2026-12-02", 2)):
        write(tmp_path, f"packing-{date}.jsonl", {**row, "batch": batch, "commit": f"abc{batch}"})
    line = TABLES["packing"](read_results(tmp_path)).splitlines()[-1]
    assert line == ("| tiny | equal | 1 / 2 | 1,200 / 1,200 | 1.50x / 1.50x |  | 2026-12-01, abc1; 2026-12-02, abc2 |")


def test_newest_row_of_a_kind_counts(tmp_path: Path) -> None:
    write(tmp_path, "z-2026-11-01.jsonl", record("dense, eager", denoise_median_s=9.0, commit="old"))
    write(tmp_path, "a-2026-12-01.jsonl", record("dense, eager", commit="new"))
    (row,) = read_results(tmp_path)
    assert (row["commit"], row["date"]) == ("new", "2026-12-01")


def test_devices_have_tables_of_their_own(tmp_path: Path) -> None:
    operator = {
        "benchmark": "kernels",
        "operator": "lift",
        "density": 0.32,
        "channels": 64,
        "dtype": "float32",
        "median_ms": 0.5,
        "released_ms": 5.0,
        "speedup_to_released": 10.0,
        "compiled_reference_ms": None,
        "threads": 2,
        "commit": "abc",
    }
    rows = [
        {**operator, "case": f"{grid}", "grid": grid, "device": device}
        for device in ("CPU", "GPU")
        for grid in ([64, 64], [128, 128], [16, 30, 52])
    ]
    write(tmp_path, "kernels-2026-12-01.jsonl", *rows)
    text = TABLES["kernels"](read_results(tmp_path))
    line = "| `lift` | 0.50 | 5.00 (10x) |  | 0.50 | 5.00 (10x) |  | 0.50 |  | 2026-12-01, abc |"
    assert [row for row in text.splitlines() if row.startswith(("On", "| `"))] == [
        "On CPU, 2 threads:", line, "On GPU, 2 threads:", line,
    ]  # fmt: skip


def test_models_that_are_cut_have_a_table_beside_the_codebases(tmp_path: Path) -> None:
    row = {"benchmark": "codebases", "device": "CPU", "threads": 2, "commit": "abc", "dense_50_s": 10.0}
    row |= {f"denoise_{name}_s": 1.25 for name in ("median", "p20", "p80")}
    cut = {**row, "case": "a wide one", "method": "7x", "speedup_to_dense": 8.0, "speedup_of_operations": 8.5}
    cut |= {"way": "pipeline", "speedup_over_operations": 0.94, "outside_share": 0.004, "over_by_hand": None}
    write(tmp_path, "codebases-2026-12-01.jsonl", cut, {**cut, "method": "7x-paper", "over_by_hand": 1.02})
    lines = TABLES["cut"](read_results(tmp_path)).splitlines()[-2:]
    assert lines[0].startswith("| a wide one | 7x | 1.25 (1.25 to 1.25) | 10.00 | 8.00x | 0.94 of 8.50x | 0.4 % |  |")
    assert "| 0.4 % | 1.02 |" in lines[1]
    assert "a wide one" not in TABLES["codebases"](read_results(tmp_path))


def test_without_rows_of_a_gpu_the_record_says_so() -> None:
    assert TABLES["record"]([]) == "On a GPU: not measured.\n"
    cpu = {**record("dense, eager"), "peak_memory_mib": None, "date": "2026-12-01"}
    assert TABLES["record"]([cpu]).endswith("\nOn a GPU: not measured.\n")


def test_text_beside_the_tables_is_kept_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- table: record -->\nold\n<!-- /table -->\nafter\n")
    arguments = [str(file), "--results", str(tmp_path)]
    assert main([*arguments, "--check"]) == 1 and "old" in file.read_text()
    assert main(arguments) == 0 and main([*arguments, "--check"]) == 0
    expected = "before\n<!-- table: record -->\nOn a GPU: not measured.\n<!-- /table -->\nafter\n"
    assert file.read_text() == expected


def test_unknown_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.md"
    file.write_text("<!-- table: speed -->\n<!-- /table -->\n")
    assert main([str(file)]) == 2 and "got 'speed'" in capsys.readouterr().err


def test_check_names_the_tables_that_are_not_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.md"
    file.write_text("<!-- table: packing -->\n<!-- /table -->\n<!-- table: record -->\n<!-- /table -->\n")
    assert main([str(file), "--results", str(tmp_path), "--check"]) == 1
    error = capsys.readouterr().err
    assert "not up to date in record; run" in error and "packing" not in error


def test_docs_show_the_committed_rows() -> None:
    pages = [README, *(README.parent / "docs").glob("*.md")]
    texts = {page: page.read_text() for page in pages}
    rows = read_results(RESULTS)
    measured = {row["benchmark"] for row in rows} & {*TABLES}
    assert all(any(f"<!-- table: {name} -->" in text for text in texts.values()) for name in measured | {"presets"})
    for page, text in texts.items():
        if "<!-- table: " in text:
            assert filled(text, rows) == text, f"run python -m benchmarks.table {page}"


def test_search_shows_its_last_round_the_best_first(tmp_path: Path) -> None:
    def row(method: str, number: int, rank: float, attributes: float) -> dict[str, Any]:
        qualities = {"attributes": {"value": attributes, "low": attributes - 0.1, "high": attributes}}
        kind = {"benchmark": "search", "case": "levels of 7x", "method": method, "round": number, "rank": rank}
        return {**kind, "prompts": 8 * 2**number, "qualities": qualities, "date": "2026-11-29", "commit": "abc"}

    rounds = [row("a", 0, 1.0, 0.7), row("b", 0, 2.0, 0.6), row("c", 0, 3.0, 0.5), row("a", 1, 2.0, 0.8)]
    write(tmp_path, "search-cpu-2026-11-29.jsonl", *rounds, row("b", 1, 1.0, 0.9))
    text = TABLES["search"](read_results(tmp_path))
    head, table = text.split("\n\n")
    assert head == "**levels of 7x** (best 2 of 3, 16 training prompts, 2026-11-29, abc)"
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:]] == [
        ["| b", "90.0 (80.0 to 90.0)"],
        ["| a", "80.0 (70.0 to 80.0)"],
    ]
