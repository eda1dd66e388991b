"""Makes the tables of the docs from the committed rows: `python -m benchmarks.table [--check] [docs/measured.md]`.

Replaces the text between `<!-- table: NAME -->` and `<!-- /table -->`. Each number comes from the newest row of its
kind, and its line ends with the date and commit of that row. Ratios are only formed between rows of the same commit and
torch version.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jitaccel.method.config import JiTConfig
from jitaccel.method.presets import PRESETS

from . import cards
from .cards import Fields
from .compare import identity
from .lab.exact import report as exact_report

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Returns the newest row of each kind in a folder of JSON lines files, with the date from the file's name."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: (_date_of(path), path.name)):
        for line in path.read_text().splitlines():
            row = {"date": _date_of(path), **json.loads(line)}
            if "error" not in row and not row.get("is_closing"):
                newest.pop(identity(row), None)
                newest[identity(row)] = row
    return [*newest.values()]


def _date_of(path: Path) -> str:
    found = _DATE.search(path.stem)
    return found[0] if found else ""


def denoise(rows: Sequence[Fields]) -> str:
    """Returns denoising times on the embedded model, against 50 steps and against the control of the same cost."""
    chosen = [row for row in rows if row["benchmark"] == "denoise" and row["case"].startswith("embedded")]
    return _each_device(chosen, _denoise)


def _each_device(rows: Sequence[Fields], table: Callable[[Sequence[Fields]], str]) -> str:
    devices = dict.fromkeys((row["device"], row["threads"]) for row in rows)
    return "\n".join(
        f"On {device}, {threads} {'thread' if threads == 1 else 'threads'}:\n\n"
        + table([row for row in rows if (row["device"], row["threads"]) == (device, threads)])
        for device, threads in devices
    )


_DENOISE = (
    "tokens|method|steps|cost in dense steps|denoising, s|against 50 steps|by FLOPs|against control|by FLOPs|measured"
)


def _denoise(rows: Sequence[Fields]) -> str:
    lines = []
    for row in rows:
        timed = "" if row["timed_steps"] == row["steps"] else f", {row['timed_steps']} timed"
        ratios = [
            f"{row[f'{kind}_to_{other}']:.2f}x" for other in ("dense", "control") for kind in ("speedup", "flop_ratio")
        ]
        line = [_side(row["grid"]), row["method"], f"{row['steps']}{timed}", f"{row['cost_dense_steps']:.2f}"]
        lines.append([*line, _seconds(row), *ratios, _origin(row)])
    return _table(_DENOISE, lines)


def kernels(rows: Sequence[Fields]) -> str:
    """Returns operator times at two picture sizes and a video size, against released code and compiled reference."""
    return _each_device([row for row in rows if row["benchmark"] == "kernels"], _kernels)


def _kernels(rows: Sequence[Fields]) -> str:
    head, lines = ["operator"], []
    found: dict[str, list[str]] = {}
    origins: dict[str, list[Fields]] = {}
    for grid in ([64, 64], [128, 128], [16, 30, 52]):
        head += [f"{_side(grid)}, ms", *(["released"] if len(grid) == 2 else []), "compiled reference"]
        for row in rows:
            shown = {"grid": grid, "density": 0.32, "channels": 64, "dtype": "float32"}
            if all(row[name] == value for name, value in shown.items()):
                origins.setdefault(row["operator"], []).append(row)
                others = [_against(row, other) for other in ("released", "compiled_reference")][len(grid) - 2 :]
                found.setdefault(row["operator"], []).extend([_short(row["median_ms"]), *others])
    for operator, cells in found.items():
        if len(cells) == len(head) - 1:
            names = " and ".join(f"`{name.strip()}`" for name in operator.split("+"))
            lines.append([names, *cells, _origin(*origins[operator])])
    return _table("|".join([*head, "measured"]), lines)


def _against(row: Fields, other: str) -> str:
    milliseconds = row[f"{other}_ms"]
    return "" if milliseconds is None else f"{_short(milliseconds)} ({_ratio(row[f'speedup_to_{other}'])})"


def packing(rows: Sequence[Fields]) -> str:
    """Returns times of several images in one forward, against a loop over them and against padding."""
    return _each_device([row for row in rows if row["benchmark"] == "packing"], _packing)


def _packing(rows: Sequence[Fields]) -> str:
    lines = []
    for case, mix in dict.fromkeys((row["case"], row["mix"]) for row in rows):
        of = [row for row in rows if (row["case"], row["mix"]) == (case, mix)]
        packed = sorted((row for row in of if row["way"].startswith("packed")), key=lambda row: row["batch"])
        padded = {row["batch"]: row for row in of if row["way"] == "padded"}
        cells = (
            [str(row["batch"]) for row in packed],
            [f"{row['tokens_per_s']:,.0f}" for row in packed],
            [f"{row['speedup_to_loop']:.2f}x" for row in packed],
            [f"{padded[row['batch']]['speedup_to_loop']:.2f}x" for row in packed if row["batch"] in padded],
        )
        lines.append([case.split(",")[0], mix, *(" / ".join(cell) for cell in cells), _origin(*of)])
    return _table("model|sizes|images|tokens/s packed|against loop|padded against loop|measured", lines)


def record(rows: Sequence[Fields]) -> str:
    """Returns each way of running a generation, against 50 dense steps run eagerly and run in the same way."""
    chosen = [row for row in rows if row["benchmark"] == "record"]
    parts = []
    for device, what in dict.fromkeys((row["device"], row["case"].rpartition(":")[0]) for row in chosen):
        here = [row for row in chosen if (row["device"], row["case"].rpartition(":")[0]) == (device, what)]
        order = ("dense", *PRESETS)
        here.sort(key=lambda row: (order.index(row["method"]), -row["steps"], row["denoise_median_s"] * -1))
        parts.append(f"{what}, on {device}:\n\n" + _table(_RECORD, [_record_line(row, here) for row in here]))
    if all(row["peak_memory_mib"] is None for row in chosen):
        parts.append("On a GPU: not measured.\n")
    return "\n".join(parts)


def auto(rows: Sequence[Fields]) -> str:
    """Returns the time that preset="auto" predicted for each target, and the time the loop took."""
    return _each_device([row for row in rows if row["benchmark"] == "auto"], _auto)


def _auto(rows: Sequence[Fields]) -> str:
    lines = [
        [
            _side(row["grid"]),
            f"{row['target_speedup']:g}x",
            ", ".join(cards.stages(JiTConfig.from_dict(row["config"]))),
            f"{row['predicted_ms'] / 1000:.2f}, {row['predicted_speedup']:.2f}x",
            f"{_seconds(row)}, {row['speedup_to_dense']:.2f}x",
            f"{100 * (row['measured_over_predicted'] - 1):+.1f} %",
            _origin(row),
        ]
        for row in rows
    ]
    return _table("tokens|target|steps|predicted, s|measured, s|longer than predicted|measured at", lines)


def codebases(rows: Sequence[Fields]) -> str:
    """Returns the gain of 7x in every codebase, and in the diffusers pipeline."""
    chosen = [row for row in rows if row["benchmark"] == "codebases" and "difference_to_pipeline" in row]
    return _each_device(chosen, _codebases)


def _codebases(rows: Sequence[Fields]) -> str:
    lines = [
        [
            row["case"],
            row["way"],
            _seconds(row),
            f"{row['dense_50_s']:.2f}",
            f"{row['speedup_to_dense']:.2f}x",
            f"{row['speedup_over_pipelines']:.3f}",
            f"{row['difference_to_pipeline']:.0e}",
            _origin(row),
        ]
        for row in rows
    ]
    return _table("model|codebase|7x, s|50 dense steps, s|gain|over the pipeline's gain|differs by|measured", lines)


def cut(rows: Sequence[Fields]) -> str:
    """Returns the gain of presets on a cut model, against its operations and against a forward written by hand."""
    return _each_device([row for row in rows if row["benchmark"] == "codebases" and "outside_share" in row], _cut)


def _cut(rows: Sequence[Fields]) -> str:
    lines = [
        [
            row["case"],
            row["method"],
            _seconds(row),
            f"{row['dense_50_s']:.2f}",
            f"{row['speedup_to_dense']:.2f}x",
            f"{row['speedup_over_operations']:.2f} of {row['speedup_of_operations']:.2f}x",
            f"{100 * row['outside_share']:.1f} %",
            "" if row["over_by_hand"] is None else f"{row['over_by_hand']:.2f}",
            _origin(row),
        ]
        for row in rows
    ]
    head = "model|preset|denoising, s|50 dense steps, s|gain|of the gain in operations|outside the network"
    return _table(f"{head}|a sparse forward over one by hand|measured", lines)


_RECORD = (
    "method|run|steps|denoising, s|against 50 plain|against 50 run alike|by FLOPs|TFLOP/s|outside, % of sparse steps|"
    "peak, MiB|first picture, s more|measured"
)


def _record_line(row: Fields, others: Sequence[Fields]) -> list[str]:
    def dense(way: str) -> Fields | None:
        alike = [o for o in others if (o["commit"], o["torch"]) == (row["commit"], row["torch"])]
        return next((o for o in alike if (o["method"], o["steps"], o["way"]) == ("dense", 50, way)), None)

    plain, alike = dense("eager"), dense("captured" if row["way"] == "float8" else row["way"])
    outside, peak = row["outside_share_of_sparse_steps"], row["peak_memory_mib"]
    return [
        row["method"],
        row["way"],
        str(row["steps"]),
        _seconds(row),
        "" if plain is None else f"{plain['denoise_median_s'] / row['denoise_median_s']:.2f}x",
        "" if alike is None else f"{alike['denoise_median_s'] / row['denoise_median_s']:.2f}x",
        "" if plain is None else f"{plain['gflop'] / row['gflop']:.2f}x",
        f"{row['tflop_per_s']:.3g}",
        "" if outside is None else f"{100 * outside:.1f}",
        "" if peak is None else f"{peak:,.0f}",
        f"{row['first_over_later_s']:.1f}",
        _origin(row),
    ]


def _seconds(row: Fields) -> str:
    median, low, high = (row[f"denoise_{name}_s"] for name in ("median", "p20", "p80"))
    digits = 1 if median >= 10 else 2
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _ratio(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:,.0f}x"


def _short(milliseconds: float) -> str:
    digits = 3 if milliseconds < 0.1 else 2 if milliseconds < 10 else 1 if milliseconds < 100 else 0
    return f"{milliseconds:.{digits}f}"


def _side(grid: Sequence[int]) -> str:
    return "x".join(map(str, grid))


def _origin(*rows: Fields) -> str:
    return "; ".join(dict.fromkeys(f"{row['date']}, {row['commit']}" for row in rows))


def _table(head: str, lines: Iterable[Sequence[str]]) -> str:
    names = head.split("|")
    rows = [names, ["---"] * len(names), *lines]
    return "".join(f"| {' | '.join(row)} |\n" if row[0] != "---" else f"|{'|'.join(row)}|\n" for row in rows)


TABLES: Mapping[str, Callable[[Sequence[Fields]], str]] = {
    "auto": auto,
    "codebases": codebases,
    "cut": cut,
    "denoise": denoise,
    "exact": exact_report.tables,
    "kernels": kernels,
    "lab": cards.lab,
    "search": cards.search,
    "overview": cards.overview_table,
    "packing": packing,
    "presets": cards.presets,
    "quality": cards.quality,
    "record": record,
}


def filled(text: str, rows: Sequence[Fields]) -> str:
    """Returns a text with every table between markers rebuilt. Raises ValueError for an unknown table name."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"tables must be one of {', '.join(TABLES)}, got {name!r}; correct the marker")
        return f"{match[1]}{TABLES[name](rows)}{match[3]}"

    return _BLOCK.sub(block, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if `--check` finds a table that is out of date; 2 for an unknown table name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if a table is not up to date"
    )
    arguments = parser.parse_args(argv)
    before = arguments.file.read_text()
    try:
        after = filled(before, read_results(arguments.results))
    except ValueError as error:
        print(f"benchmarks.table: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        pairs = zip(_BLOCK.finditer(before), _BLOCK.finditer(after), strict=True)
        stale = [old["name"] for old, new in pairs if old[0] != new[0]]
        if stale:
            print(
                f"benchmarks.table: {arguments.file} is not up to date in {', '.join(stale)}; "
                f"run python -m benchmarks.table {arguments.file}",
                file=sys.stderr,
            )
        return int(bool(stale))
    arguments.file.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
