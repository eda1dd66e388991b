"""`preset="auto"`: the time predicted for each target from a few timed steps, and the time the loop then took."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from jitaccel.evaluation.comparison import Method, TimedCall, generate
from jitaccel.method.presets import DENSE_STEPS
from jitaccel.speed.auto import Choice, decide, measure_costs

from ..pipelines import Subject, embedded_subject
from ..registry import Case, Measurement, Options, percentiles
from .denoise import no_embedded

TARGETS = (3.0, 4.0, 6.0, 8.0)


def measure(subject: Subject, options: Options, targets: Sequence[float] = TARGETS) -> Iterator[Measurement]:
    """Yields a row for each target speed-up over 50 dense steps; dense runs alternate with the chosen plan."""
    size = (subject.call["height"], subject.call["width"])
    costs = measure_costs(subject.pipe, size, subject.text_tokens)
    choices = {f"{target:g}x": decide(costs, target_speedup=target) for target in targets}
    methods = [Method(name="dense", steps=DENSE_STEPS), *(_method(name, each) for name, each in choices.items())]
    found: dict[str, list[TimedCall]] = {method.name: [] for method in methods}
    for _ in range(options.repeat):
        for method in methods:
            generator = torch.Generator().manual_seed(options.seed)
            found[method.name].append(generate(subject.pipe, method, generator=generator, **subject.call))
    seconds = {name: percentiles([each.denoise_s for each in some]) for name, some in found.items()}
    for (name, choice), target in zip(choices.items(), targets, strict=True):
        yield _row(name, target, choice, seconds[name], seconds["dense"][0], subject, options)


def _method(name: str, choice: Choice) -> Method:
    return Method(name=name, steps=int(choice.config.steps), config=choice.config)


def _row(
    name: str, target: float, choice: Choice, seconds: tuple[float, float, float], dense_s: float,
    subject: Subject, options: Options,
) -> Measurement:  # fmt: skip
    median, low, high = seconds
    fields = {
        "method": name,
        "target_speedup": target,
        "steps": choice.config.steps,
        "config": choice.config.to_dict(),
        "grid": subject.grid,
        "text_tokens": subject.text_tokens,
        "seed": options.seed,
        "repeats": options.repeat,
        "predicted_ms": round(choice.predicted_ms, 2),
        "predicted_speedup": round(choice.predicted_speedup, 3),
        "denoise_median_s": round(median, 5),
        "denoise_p20_s": round(low, 5),
        "denoise_p80_s": round(high, 5),
        "dense_50_s": round(dense_s, 5),
        "speedup_to_dense": round(dense_s / median, 3),
        "measured_over_predicted": round(1000.0 * median / choice.predicted_ms, 3),
    }
    line = (
        f"{name:5} {choice.config.steps:3} steps  "
        f"predicted {choice.predicted_ms:.0f} ms, {choice.predicted_speedup:.2f}x  "
        f"measured {1000 * median:.0f} ms ({1000 * low:.0f} to {1000 * high:.0f}), {dense_s / median:.2f}x"
    )
    return Measurement(line=line, fields=fields)


def _run(options: Options, grid: tuple[int, int]) -> Iterator[Measurement]:
    yield from measure(embedded_subject(options.device, grid, options.seed), options)


CASES = tuple(
    Case(
        group="auto",
        size=size,
        name=f"embedded model, {side}x{side} tokens",
        run=functools.partial(_run, grid=(side, side)),
        why_not=no_embedded,
    )
    for size, side in (("small", 32), ("large", 64))
)
