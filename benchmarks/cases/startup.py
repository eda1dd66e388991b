"""What a process pays before its first picture: imports, loading, `apply`, and the first picture against the second."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

from jitaccel.api import embedded_model

from ..registry import Case, Options, Row, percentiles

_SCRIPT = """
import json, sys, time
marks, names = [time.perf_counter()], []
def mark(name):
    names.append(name)
    marks.append(time.perf_counter())
import jitaccel
mark("import jitaccel")
import torch
mark("import torch")
from jitaccel.cli.loading import load_pipeline
pipe = load_pipeline(None, device=sys.argv[1])
pipe.set_progress_bar_config(disable=True)
mark("load the embedded pipeline")
jitaccel.apply(pipe, "7x")
mark("apply")
for name in ("first picture", "second picture"):
    pipe("a red circle", height=256, width=256, max_sequence_length=48, generator=torch.Generator().manual_seed(0))
    mark(name)
print(json.dumps({name: after - before for name, before, after in zip(names, marks, marks[1:])}))
"""


def measure(options: Options) -> Iterator[Row]:
    """Yields a row for each part, of fresh processes."""
    runs = [_run(options) for _ in range(options.repeat)]
    for what in runs[0]:
        median, low, high = percentiles([run[what] for run in runs])
        fields = {
            "what": what,
            "seed": options.seed,
            "repeats": options.repeat,
            "median_s": round(median, 5),
            "p20_s": round(low, 5),
            "p80_s": round(high, 5),
        }
        yield Row(line=f"{what:28} {median:8.3f} s ({low:.3f} to {high:.3f})", fields=fields)


def _run(options: Options) -> dict[str, float]:
    command = [sys.executable, "-c", _SCRIPT, str(options.device)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def _why_not(options: Options) -> str | None:
    folder = embedded_model()
    return None if (folder / "model_index.json").is_file() else f"no embedded model in {folder}"


CASES = (Case(group="startup", size="small", name="embedded model, fresh processes", run=measure, why_not=_why_not),)
