"""Times what a process spends until its first picture: imports, loading, `apply`, the first picture, compilation."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from ..registry import Case, Measurement, Options, percentiles
from .denoise import no_embedded, no_large_cuda

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
from jitaccel.loading import load_pipeline
pipe = load_pipeline(None, device=sys.argv[1])
pipe.set_progress_bar_config(disable=True)
mark("load the embedded pipeline")
jitaccel.apply(pipe, "7x")
mark("apply")
for name in ("first picture", "second picture"):
    noise = torch.Generator().manual_seed(0)
    pipe("green mountains at noon with a lake", height=256, width=256, max_sequence_length=48, generator=noise)
    mark(name)
print(json.dumps({name: after - before for name, before, after in zip(names, marks, marks[1:])}))
"""

_COMPILE = """
import json, sys, time
import torch
import jitaccel
from jitaccel.benchmarks.pipelines import FLUX_DEV, embedded_subject, random_subject
device = torch.device(sys.argv[1])
if sys.argv[2] == "flux":
    subject = random_subject(FLUX_DEV, device, torch.bfloat16, (64, 64), 0, text_tokens=512)
else:
    subject = embedded_subject(device, (32, 32), 0)
call = dict(subject.call)
size = call.pop("height"), call.pop("width")
call.setdefault("prompt", None)
handle = jitaccel.apply(subject.pipe, "7x", compile={"graphs": True}, strict=True)
start = time.perf_counter()
stats = handle.warmup([size], progress=False, **{**call, "output_type": "latent"})
assert stats.compiled.captures == handle.config.num_stages, stats
print(json.dumps(time.perf_counter() - start))
"""


def measure_compilation(options: Options, size: str) -> Iterator[Measurement]:
    """Yields the time to compile and capture the stages of 7x, with an empty cache and with a filled one."""
    with tempfile.TemporaryDirectory() as folder:
        cold = _json(_COMPILE, str(options.device), size, TORCHINDUCTOR_CACHE_DIR=folder)
        warm = [
            _json(_COMPILE, str(options.device), size, TORCHINDUCTOR_CACHE_DIR=folder) for _ in range(options.repeat)
        ]
    yield _row("compile and capture 7x's stages, cold cache", [cold], options)
    yield _row("compile and capture 7x's stages, warm cache", warm, options)


def measure(options: Options) -> Iterator[Measurement]:
    """Yields a row for each part, measured in fresh processes."""
    runs = [_json(_SCRIPT, str(options.device)) for _ in range(options.repeat)]
    for what in runs[0]:
        yield _row(what, [run[what] for run in runs], options)


def _row(what: str, seconds: Sequence[float], options: Options) -> Measurement:
    median, low, high = percentiles(seconds)
    fields = {
        "what": what,
        "seed": options.seed,
        "repeats": len(seconds),
        "median_s": round(median, 5),
        "p20_s": round(low, 5),
        "p80_s": round(high, 5),
    }
    return Measurement(line=f"{what:46} {median:8.3f} s ({low:.3f} to {high:.3f})", fields=fields)


def _json(script: str, *arguments: str, **environment: str) -> Any:
    """Runs a script in a separate process and returns its last line, parsed as JSON."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


CASES = (
    Case(group="startup", size="small", name="embedded model, fresh processes", run=measure, why_not=no_embedded),
    Case(
        group="startup",
        size="small",
        name="embedded model, 32x32 tokens, compilation",
        run=functools.partial(measure_compilation, size="small"),
        why_not=no_embedded,
    ),
    Case(
        group="startup",
        size="flux",
        name="FLUX.1-dev's size, 1024x1024, compilation",
        run=functools.partial(measure_compilation, size="flux"),
        why_not=no_large_cuda,
    ),
)
