"""The operators' campaign with AddressSanitizer and UndefinedBehaviorSanitizer, in a separate process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from jitaccel import build
from tests.campaigns.campaign import Counts, Result

NAME = "operators, sanitizers"
_ROOT = Path(__file__).resolve().parents[2]


def run(seed: int, minutes: float) -> Result | None:
    """Returns the result; None without a g++ that has the sanitizers' runtimes."""
    runtimes = _runtimes()
    if not runtimes:
        return None
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above)
        build.build("cpu", folder / "_C_cpu.so", sanitize=True, required=True)
        rows = folder / "rows.jsonl"
        command = ["-m", "tests.campaigns", "--only", "operators", "--processes", "1", "--seed", str(seed)]
        done = subprocess.run(
            [sys.executable, *command, "--minutes", str(minutes), "--out", str(rows)],
            cwd=_ROOT,
            env={
                **os.environ,
                "LD_PRELOAD": ":".join(runtimes),
                # Python never frees all memory, torch's libraries repeat symbols, and absurd sizes are requested.
                "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1",
                "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
                "JITACCEL_LIBRARIES": str(folder),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if not rows.exists():
            return Result(name=NAME, survivors=[f"the process ended with {done.returncode}: {done.stderr[-1500:]}"])
        (row,) = [json.loads(line) for line in rows.read_text().splitlines()]
    counts = Counts(operations=row["operations"], faults=row["faults"])
    return Result(name=NAME, cases=row["cases"], seconds=row["cases_s"], counts=counts, survivors=row["survivors"])


def _runtimes() -> list[str]:
    if shutil.which("g++") is None:
        return []
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return found if all(Path(each).is_absolute() for each in found) else []
