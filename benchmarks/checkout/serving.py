"""Loads the server, started by its command, with 200 requests, 8 at a time, to two replicas of a tiny random FLUX.1.

This measures the server: HTTP, queue, batching and Ray. The model takes about as long as these. Client, server and
replicas share the machine. Memory is the resident memory of all server processes, summed from /proc; shared pages count
more than once. It is read after a fifth of the requests and at the end, because a server that leaks memory with each
request would grow.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..registry import Case, Measurement, Options

REQUESTS, AT_ONCE, REPLICAS, BATCH, PIXELS, PRESET = 200, 8, 2, 4, 48, "7x"


def measure(options: Options) -> Iterator[Measurement]:
    """Yields one row."""
    from tests.support import served, tiny

    with tempfile.TemporaryDirectory() as folder:
        tiny.pipeline().save_pretrained(folder)
        arguments = {"--model": folder, "--replicas": REPLICAS, "--cpus": 0.4, "--threads": 1, "--batch-size": BATCH}
        pairs = {**arguments, "--device": "cpu", "--dtype": "float32"}.items()
        with served.served(*(str(part) for pair in pairs for part in pair)) as server:
            yield _row(_load(server, tiny.TEXT_TOKENS), options)


def _load(server: Any, text_tokens: int) -> dict[str, Any]:
    body = {"prompt": "a red circle", "height": PIXELS, "width": PIXELS, "max_sequence_length": text_tokens}
    for seed in range(2 * REPLICAS):  # each replica's first picture takes longer
        server.generate({**body, "seed": seed})
    done, lock = itertools.count(1), threading.Lock()
    memory: list[float] = []

    def ask(seed: int) -> tuple[int, float, Any]:
        started = time.perf_counter()
        answer = server.generate({**body, "preset": PRESET, "seed": seed})
        seconds = time.perf_counter() - started
        with lock:
            if next(done) == REQUESTS // 5:
                memory.append(_memory_mib(server.process))
        said = json.loads(answer.headers["x-jitaccel-statistics"]) if answer.status == 200 else None
        return answer.status, seconds, said

    started = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(ask, range(REQUESTS)))
    seconds = time.perf_counter() - started
    memory.append(_memory_mib(server.process))
    statistics = [said for _, _, said in answers if said is not None]
    return {
        "failed": sum(status != 200 for status, _, _ in answers),
        "seconds": seconds,
        "latencies": [each for _, each, _ in answers],
        "memory": memory,
        "batches": [said["batch"] for said in statistics],
        "generation": [said["generation_s"] for said in statistics],
        "by_replica": sorted(sum(said["replica"] == who for said in statistics) for who in _names(statistics)),
    }


def _names(statistics: list[Any]) -> set[str]:
    return {said["replica"] for said in statistics}


def _row(found: dict[str, Any], options: Options) -> Measurement:
    p50, p95 = torch.quantile(
        torch.tensor(found["latencies"], dtype=torch.float64), torch.tensor([0.5, 0.95], dtype=torch.float64)
    ).tolist()
    early, late = found["memory"]
    fields = {
        "preset": PRESET,
        "grid": [PIXELS // 4, PIXELS // 4],
        "requests": REQUESTS,
        "at_once": AT_ONCE,
        "replicas": REPLICAS,
        "most_in_batch": BATCH,
        "execution": "indexed",
        "dtype": "float32",
        "seed": options.seed,
        "failed": found["failed"],
        "requests_per_s": round(REQUESTS / found["seconds"], 3),
        "p50_s": round(p50, 4),
        "p95_s": round(p95, 4),
        "mean_generation_s": round(sum(found["generation"]) / len(found["generation"]), 4),
        "mean_batch": round(sum(found["batches"]) / len(found["batches"]), 3),
        "requests_by_replica": found["by_replica"],
        "memory_after_a_fifth_mib": round(early, 1),
        "memory_at_the_end_mib": round(late, 1),
        "load_average": _load_average(),
        "ray": _ray_version(),
    }
    line = (
        f"{REQUESTS} requests, {AT_ONCE} at once: {fields['requests_per_s']:.2f} a second, p50 {p50:.2f} s, "
        f"p95 {p95:.2f} s, {found['failed']} failed, memory {early:.0f} to {late:.0f} MiB"
    )
    return Measurement(line=line, fields=fields)


def _load_average() -> float:
    return float(Path("/proc/loadavg").read_text().split()[0])


def _ray_version() -> str:
    from jitaccel.provenance import version

    return version("ray") or "none"


def _memory_mib(process: int) -> float:
    """Returns the resident memory of a command and of all its Ray processes, in MiB."""
    own = _command_folder(process)
    processes = [path for path in Path("/proc").glob("[0-9]*") if _command_folder(int(path.name)) == own]
    return sum(map(_resident_kib, processes)) / 1024


def _command_folder(process: int) -> str | None:
    """Returns the folder of the Ray instance of a process, which the command set in its environment."""
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((entry.decode() for entry in variables if entry.startswith(b"RAY_TMPDIR=")), None)


def _resident_kib(process: Path) -> int:
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError:  # the process has ended
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def _why_not(options: Options) -> str | None:
    if options.device.type != "cpu":
        return "the tiny pipeline is measured on the CPU"
    return None if importlib.util.find_spec("ray") else "no ray; pip install 'jitaccel[serve]'"


CASES = (
    Case(
        group="serving",
        size="small",
        name="200 requests, 8 at a time, two replicas of a tiny random FLUX.1",
        run=measure,
        why_not=_why_not,
        is_long=True,
    ),
)
