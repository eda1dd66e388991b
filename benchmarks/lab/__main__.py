"""Answers the lab's questions on held-out prompts of the embedded model: `python -m benchmarks.lab --prompts 256`.

Every variant and 50 dense steps use the same prompts and noise, and the judge rates all pictures. Matrix products run
in bfloat16 (autocast), as recorded in the rows; `--exact` runs them in float32. Rows are stored in OUT/rows.jsonl and
reused if weights, settings and commit are the same (with `--any-commit`, weights and settings). `report.md` has a table
for each question, and `table.jsonl` a record for each variant. `python -m benchmarks.lab.search` searches over stages.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jitaccel.api import embedded_model
from jitaccel.artefacts.manifest import file_digest
from jitaccel.evaluation.comparison import Method
from jitaccel.evaluation.judging import load_judge
from jitaccel.evaluation.quality.rows import Row, settings_as_now
from jitaccel.evaluation.scenes.prompts import held_out
from jitaccel.evaluation.study import append_lines, read_lines
from jitaccel.loading import load_pipeline
from jitaccel.provenance import first_line, provenance

from .judging import judged
from .questions import CONTROLS, QUESTIONS, REFERENCE, Way, dense
from .report import write
from .sampler import Bench, Sampled, sample, sample_by_pipeline
from .sizes import Sizes, sample_sizes

_CHUNK = 32


def variants(only: Sequence[str]) -> dict[str, Way]:
    """Returns the reference and the variants of the named questions, or of all questions if none is named."""
    chosen = {name: some for name, some in {"controls": CONTROLS, **QUESTIONS}.items() if not only or name in only}
    found = {REFERENCE: dense(50, "native")}
    for some in chosen.values():
        found.update(some)
    return found


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Makes the missing rows of variants. Stored rows are reused if they have the same `origin`."""

    pipe: Any
    judge: Any
    folder: Path
    count: int
    seed: int
    exact: bool
    origin: Row
    any_commit: bool

    def rows(self, chosen: Mapping[str, Way]) -> list[Row]:
        """Returns the rows of all variants, ordered by variant and prompt."""
        done = {(row["method"], row["prompt_index"]): row for row in self._kept(chosen)}
        for name, variant in chosen.items():
            for start in range(0, self.count, _CHUNK):
                part = range(start, min(start + _CHUNK, self.count))
                if all((name, k) in done for k in part):
                    continue
                for row in self._made(name, variant, part):
                    done[name, row["prompt_index"]] = row
        return [done[name, k] for name in chosen for k in range(self.count)]

    def _kept(self, chosen: Mapping[str, Way]) -> Iterator[Row]:
        names = {"weights", "device", "torch", "seed", "dtype"} | (set() if self.any_commit else {"commit"})
        for row in read_lines(self.folder / "rows.jsonl"):
            variant = chosen.get(row["method"])
            is_same = all(row[name] == self.origin[name] for name in names)
            if is_same and variant is not None and settings_as_now(row["config"]) == _settings(variant):
                yield row

    def _made(self, name: str, variant: Way, part: range) -> list[Row]:
        prompts = held_out(part.stop, seed=self.seed)[part.start :]
        bench = Bench.of(self.pipe, prompts, seed=_noise_seed(self.seed, part))
        reference = self._reference(bench, part)
        made = reference if name == REFERENCE else self._sampled(bench, variant)
        steps = variant.steps if isinstance(variant, Method | Sizes) else variant.config.steps
        shared = {"method": name, "steps": steps, "config": _settings(variant), **self.origin}
        rows = [*judged(bench, self.judge, made, reference, shared, first=part.start)]
        with append_lines(self.folder / "rows.jsonl") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return rows

    def _sampled(self, bench: Bench, way: Way) -> Sampled:
        if isinstance(way, Sizes):
            return sample_sizes(bench, way, mixed=not self.exact)
        by = sample_by_pipeline if isinstance(way, Method) else sample
        return by(bench, way, mixed=not self.exact)  # type: ignore[arg-type]

    def _reference(self, bench: Bench, part: range) -> Sampled:
        """Returns the pictures of 50 dense steps, read from disk if they were made before."""
        key = "-".join(str(self.origin[name])[:12] for name in ("weights", "dtype", "seed"))
        path = self.folder / f"reference-{key}-{part.start}-{part.stop}.npz"
        if path.exists():
            with np.load(path) as kept:
                return Sampled(kept["pictures"], kept["gflop"], kept["stages"], kept["latents"])
        made = sample(bench, dense(50, "native"), mixed=not self.exact)
        np.savez_compressed(
            path, pictures=made.pictures, gflop=made.gflop, stages=made.stages, latents=made.latents
        )
        return made


def _noise_seed(seed: int, part: range) -> int:
    return 100_000 * seed + part.start


def _settings(variant: Way) -> Row:
    """Returns the settings that identify a variant, in the form that JSON returns them."""
    if isinstance(variant, Method | Sizes):
        settings: Row = json.loads(json.dumps(variant.settings))
        return settings
    own = {
        "lifter_map": None if variant.lifter is None else _told(variant.lifter),
        "scores": None if variant.scores is None else _told(variant.scores),
        "stale_keys": variant.stale_keys,
        "cache_threshold": variant.cache_threshold,
    }
    settings = json.loads(json.dumps({**variant.config.to_dict(), **own}))
    return settings


def _told(function: Any) -> str:
    arguments = getattr(function, "keywords", {})
    name = getattr(function, "func", function).__name__
    return f"{name}({', '.join(f'{key}={value}' for key, value in arguments.items())})"


def main(argv: Sequence[str] | None = None) -> int:
    """Makes missing rows and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256, help="number of held-out prompts")
    parser.add_argument("--seed", type=int, default=0, help="0: the prompts of reported results; use others to search")
    parser.add_argument("--only", nargs="*", default=[], help="controls, " + ", ".join(QUESTIONS))
    parser.add_argument("--variants", nargs="*", default=[], help="run only these variants; a table needs all")
    parser.add_argument("--out", type=Path, default=Path("out/lab"))
    parser.add_argument("--exact", action="store_true", help="float32 instead of bfloat16 matrix products")
    parser.add_argument("--any-commit", action="store_true", help="reuse rows of other commits")
    options = parser.parse_args(argv)
    if unknown := set(options.only) - {"controls", *QUESTIONS}:
        parser.error(f"--only must name controls or questions ({', '.join(QUESTIONS)}), got {', '.join(unknown)}")
    options.out.mkdir(parents=True, exist_ok=True)
    device, weights = torch.device("cpu"), embedded_model() / "transformer" / "diffusion_pytorch_model.safetensors"
    dtype = "float32" if options.exact else "float32, matrix products in bfloat16"
    origin = {**provenance(device), "weights": file_digest(weights), "seed": options.seed, "dtype": dtype}
    print(first_line(device), flush=True)
    lab = Lab(
        pipe=load_pipeline(None, device="cpu"), judge=load_judge(), folder=options.out, count=options.prompts,
        seed=options.seed, exact=options.exact, origin=origin, any_commit=options.any_commit,
    )  # fmt: skip
    chosen = variants(options.only)
    if options.variants:
        chosen = {name: way for name, way in chosen.items() if name in {REFERENCE, *options.variants}}
    print(write(lab.rows(chosen), [*chosen], options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
