"""Searches stages under a budget, or levels, on training prompts: `python -m benchmarks.lab.search --budget 6.5`.

With `--budget`, candidates are all combinations of steps, ends of stages and densities in a small grid whose cost is
just below the budget, thinned evenly to `--most`, with the lifter, moves and solver of few-steps. With `--levels-of`,
they are a preset or dense steps on other levels, the same levels for each.

Each round keeps the better half and doubles the prompts. Candidates are ordered by the mean of two ranks: attributes
shown, and Frechet distance to 50 dense steps. The winner still has to be judged on the held-out prompts, which the
search never sees, because its prompts come from another seed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats  # type: ignore[import-untyped]

from jitaccel.errors import CommandError
from jitaccel.evaluation.judging import load_judge
from jitaccel.evaluation.methods import parse_methods
from jitaccel.evaluation.quality.rows import Row
from jitaccel.evaluation.quality.summary import summary
from jitaccel.evaluation.scenes.prompts import held_out
from jitaccel.loading import load_pipeline
from jitaccel.method.config import JiTConfig
from jitaccel.method.presets import PRESETS
from jitaccel.patches.flux.flops import flux_flops
from jitaccel.provenance import provenance
from jitaccel.speed.control import equivalent_dense_steps

from .judging import judged
from .questions import REFERENCE, dense, native_levels
from .sampler import GRID, TEXT_TOKENS, Bench, Sampled, sample
from .variant import Variant

BENCHMARK = "search"
TRAINING_SEED = 1
DENSITIES = ((0.32, 1.0), (0.5, 1.0), (0.32, 0.6, 1.0))
ALPHAS, BETAS = (0.7, 1.0, 1.4, 2.0), (0.3, 0.425, 0.6)


def candidates(budget: float, model: Mapping[str, object], slack: float = 0.6, max_steps: int = 24) -> list[JiTConfig]:
    """Returns configurations that cost between `budget - slack` and `budget` dense steps."""
    cost = functools.partial(flux_flops, model)
    found = []
    for densities in DENSITIES:
        for steps in range(len(densities), max_steps + 1):
            for ends in _ends(steps, len(densities)):
                boundaries = tuple((end + 1e-6) / steps for end in ends[:-1])
                config = PRESETS["few-steps"].replace(densities=densities, boundaries=(*boundaries, 1.0), steps=steps)
                spent = equivalent_dense_steps(config, GRID[0] * GRID[1], TEXT_TOKENS, cost)
                if budget - slack <= spent <= budget:
                    found.append(config)
    return found


def thinned(found: Sequence[JiTConfig], most: int) -> list[JiTConfig]:
    """Returns at most `most` configurations, picked evenly from first to last."""
    if len(found) <= most:
        return list(found)
    return [found[round(k * (len(found) - 1) / max(most - 1, 1))] for k in range(most)]


def on_levels(config: JiTConfig) -> dict[str, JiTConfig]:
    """Returns a configuration with its own levels, with other Beta levels, and with those of the model's scheduler."""
    pairs = dict.fromkeys([(config.alpha, config.beta), *itertools.product(ALPHAS, BETAS)])
    found = {f"alpha {a:g}, beta {b:g}": config.replace(alpha=a, beta=b) for a, b in pairs}
    return {**found, "native": config.replace(schedule=native_levels(int(config.steps)))}


def _ends(steps: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Yields ends of stages in which the first takes at most half of the steps, and a middle one not more than it."""
    for first in range(1, steps // 2 + 1):
        if stages == 2:
            yield first, steps
        else:
            yield from ((first, second, steps) for second in range(first + 1, min(2 * first, steps - 1) + 1))


def config_name(config: JiTConfig) -> str:
    """Returns a short name made of the stages' ends and densities."""
    ends = config.stage_ends(int(config.steps))
    return " ".join(f"{end}@{density:g}" for end, density in zip(ends, config.densities, strict=True))


def search(
    among: Mapping[str, JiTConfig], bench: Bench, judge: object, start: int, reference: Sampled
) -> list[list[Row]]:
    """Returns the records of each round, best first. The first round has `start` prompts, the last round all."""
    left = dict(among)
    rows: list[Row] = []
    rounds, done, count = [], 0, start
    while True:
        part = slice(done, count)
        some, beside = _part(bench, part), _sampled_part(reference, part)
        rows += judged(some, judge, beside, beside, {"method": REFERENCE, "steps": 50}, first=done)  # type: ignore[arg-type]
        for name, config in left.items():
            made = sample(some, Variant(config=config))
            shared = {"method": name, "steps": config.steps, "config": config.to_dict()}
            rows += judged(some, judge, made, beside, shared, first=done)  # type: ignore[arg-type]
        ranked = _ranked([row for row in rows if row["method"] in {REFERENCE, *left}], [*left])
        rounds.append(ranked)
        if count == len(bench.prompts):
            return rounds
        left = {record["method"]: left[record["method"]] for record in ranked[: -(-len(ranked) // 2)]}
        done, count = count, min(2 * count, len(bench.prompts))


def _ranked(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    records = [record for record in summary(rows, [REFERENCE, *names]) if record["method"] != REFERENCE]
    values = {key: np.array([r["qualities"][key]["value"] for r in records]) for key in ("attributes", "frechet")}
    rank = stats.rankdata(-values["attributes"]) + stats.rankdata(values["frechet"])
    return [{**records[k], "rank": float(rank[k]) / 2} for k in np.argsort(rank, kind="stable")]


def _part(bench: Bench, part: slice) -> Bench:
    return Bench(bench.pipe, bench.prompts[part], bench.texts.part(part), bench.noise[part], bench.seed + part.start)


def _sampled_part(made: Sampled, part: slice) -> Sampled:
    latents = None if made.latents is None else made.latents[part]
    return Sampled(made.pictures[part], made.gflop[part], made.stages[part], latents)


def _searches(
    options: argparse.Namespace, model: Mapping[str, object]
) -> Iterator[tuple[str, Mapping[str, JiTConfig]]]:
    for budget in options.budget:
        chosen = thinned(candidates(budget, model), options.most)
        yield f"stages under {budget:g}", {config_name(config): config for config in chosen}
    for method in options.levels_of:
        (config,) = (found.config for found in parse_methods(method))
        if config is None or config.steps == "caller" or config.schedule == "native":
            raise CommandError(f"--levels-of must name presets, beta:N or dpm:N, got {method!r}")
        yield f"levels of {method}", on_levels(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Searches, prints the rounds, and appends them as JSON lines to OUT/search.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, nargs="*", default=[], help="costs to search stages at, dense steps")
    parser.add_argument("--levels-of", nargs="*", default=[], help="presets, beta:N or dpm:N to search levels for")
    parser.add_argument("--most", type=int, default=24, help="candidates for each budget")
    parser.add_argument("--prompts", type=int, default=128, help="prompts of the last round")
    parser.add_argument("--start", type=int, default=32, help="prompts of the first round")
    parser.add_argument("--out", type=Path, default=Path("out/search"))
    options = parser.parse_args(argv)
    if not options.budget and not options.levels_of:
        parser.error("nothing to search for: give --budget 6.5 or --levels-of 7x")
    options.out.mkdir(parents=True, exist_ok=True)
    pipe, judge = load_pipeline(None, device="cpu"), load_judge()
    bench = Bench.of(pipe, held_out(options.prompts, seed=TRAINING_SEED), seed=100_000 * TRAINING_SEED)
    reference = sample(bench, dense(50, "native"))
    origin = {**provenance(torch.device("cpu")), "seed": TRAINING_SEED}
    for case, among in _searches(options, pipe.transformer.config):
        for number, ranked in enumerate(search(among, bench, judge, options.start, reference)):
            with (options.out / "search.jsonl").open("a") as file:
                for record in ranked:
                    row = {**record, "benchmark": BENCHMARK, "case": case, "round": number, **origin}
                    file.write(json.dumps(row) + "\n")
            for record in ranked:
                found = {key: record["qualities"][key]["value"] for key in ("attributes", "frechet", "perceptual")}
                shown = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
                head = f"{case}, round {number}: {record['method']:24}"
                print(f"{head} {record['cost_dense_steps']:.2f}: {shown}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
