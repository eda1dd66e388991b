"""Denoising through the pipeline: dense, control, 4x and 7x, on the embedded model and on random transformers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from jitaccel.api import embedded_model
from jitaccel.evaluation.comparison import Method, TimedCall, compared_methods, generate, warm_up
from jitaccel.patches import cost_of

from ..pipelines import FLUX_DEV, FLUX_QUARTER, Subject, embedded_subject, random_subject
from ..registry import Case, Measurement, Options, percentiles

_FLUX_GIB = 32  # 24 for weights, and the memory of a step


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """One method's generations. `scale` is its number of steps divided by the number of timed steps."""

    method: Method
    generations: list[TimedCall]
    scale: float

    def seconds(self, name: str = "denoise_s") -> tuple[float, float, float]:
        median, low, high = percentiles([self.scale * getattr(g, name) for g in self.generations])
        return median, low, high

    def parts(self, name: str) -> float:
        """Returns the median over repeats of `network_s` or `outside_s`; 0 if the pipeline ran unpatched."""
        found = [getattr(g.stats, name) for g in self.generations if g.stats is not None]
        return self.scale * percentiles(found)[0] if found else 0.0

    @property
    def flops(self) -> float:
        return self.scale * self.generations[0].flops

    @property
    def sparse_outside_share(self) -> float | None:
        """The share of sparse steps' time outside the transformer, over all repeats; None without sparse steps."""
        steps = [s for g in self.generations if g.stats for s in g.stats.steps if s.stage < len(g.stats.anchors) - 1]
        total = sum(step.network_s + step.outside_s for step in steps)
        return sum(step.outside_s for step in steps) / total if total else None


def measure(subject: Subject, options: Options, timed_dense_steps: int | None = None) -> list[_Measured]:
    """Returns every method's generations: a warm-up, then the methods in turns, `options.repeat` times over."""
    cost, num_tokens = cost_of(subject.pipe), subject.grid[0] * subject.grid[1]
    methods = compared_methods(cost, num_tokens, subject.text_tokens)
    timed = {m.name: m if m.name != "dense" else _shortened(m, timed_dense_steps) for m in methods}
    results = [_Measured(method=m, generations=[], scale=m.steps / timed[m.name].steps) for m in methods]
    warm_up(subject.pipe, generator=_generator(options), **subject.call)
    with tqdm(total=options.repeat * len(methods), unit="run", leave=False) as bar:
        for _ in range(options.repeat):
            for result in results:
                bar.set_description(result.method.name)
                made = generate(subject.pipe, timed[result.method.name], generator=_generator(options), **subject.call)
                result.generations.append(made)
                bar.update()
    return results


def _shortened(method: Method, steps: int | None) -> Method:
    return method if steps is None else dataclasses.replace(method, steps=steps)


def _generator(options: Options) -> torch.Generator:
    return torch.Generator().manual_seed(options.seed)


def rows(results: list[_Measured], subject: Subject, options: Options) -> Iterator[Measurement]:
    """Yields one row for each method."""
    by_name = {result.method.name: result for result in results}
    dense, control = by_name["dense"], by_name["control"]
    for result in results:
        fields = _fields(result, dense, control, subject, options)
        yield Measurement(line=_line(fields), fields=fields)


def _fields(
    result: _Measured, dense: _Measured, control: _Measured, subject: Subject, options: Options
) -> dict[str, Any]:
    median, low, high = result.seconds()
    per_step = dense.flops / dense.method.steps
    has_quality = subject.has_quality and dense.scale == 1.0  # a shortened run is no reference
    fields: dict[str, Any] = {
        "method": result.method.name,
        "steps": result.method.steps,
        "timed_steps": round(result.method.steps / result.scale),
        "config": None if result.method.config is None else result.method.config.to_dict(),
        "batch": 1,
        "grid": subject.grid,
        "text_tokens": subject.text_tokens,
        "dtype": str(subject.pipe.transformer.dtype).removeprefix("torch."),
        "seed": options.seed,
        "repeats": options.repeat,
        "denoise_median_s": round(median, 5),
        "denoise_p20_s": round(low, 5),
        "denoise_p80_s": round(high, 5),
        "network_median_s": round(result.parts("network_s"), 5),
        "outside_median_s": round(result.parts("outside_s"), 5),
        "outside_share_of_sparse_steps": result.sparse_outside_share,
        "gflop": round(result.flops / 1e9, 3),
        "cost_dense_steps": round(result.flops / per_step, 3),
        "psnr_to_dense_db": _psnr(result, dense) if has_quality else None,
    }
    for name, other in (("dense", dense), ("control", control)):
        speedup, ratio = other.seconds()[0] / median, other.flops / result.flops
        fields[f"speedup_to_{name}"] = round(speedup, 3)
        fields[f"flop_ratio_to_{name}"] = round(ratio, 3)
        fields[f"speedup_over_flop_ratio_to_{name}"] = round(speedup / ratio, 3)
    return fields


def _psnr(result: _Measured, dense: _Measured) -> float | None:
    from jitaccel.evaluation.quality.metrics import psnr_db

    if result is dense:
        return None
    return round(psnr_db(result.generations[0].pictures, dense.generations[0].pictures), 2)


def _line(f: dict[str, Any]) -> str:
    outside, quality = f["outside_share_of_sparse_steps"], f["psnr_to_dense_db"]
    steps = f"{f['steps']:3d} steps" + (f" ({f['timed_steps']} timed)" if f["timed_steps"] != f["steps"] else "")
    return "  ".join(
        (
            f"{f['method']:8}{steps:19}",
            f"{f['denoise_median_s']:9.3f} s ({f['denoise_p20_s']:.3f} to {f['denoise_p80_s']:.3f})",
            f"cost {f['cost_dense_steps']:5.2f} dense steps",
            f"{f['speedup_to_dense']:5.2f}x of {f['flop_ratio_to_dense']:.2f}x by FLOPs "
            f"({f['speedup_over_flop_ratio_to_dense']:.2f})",
            f"to control {f['speedup_to_control']:.2f}x of {f['flop_ratio_to_control']:.2f}x",
            "" if outside is None else f"outside {100 * outside:.1f} % of sparse steps",
            "" if quality is None else f"PSNR {quality:.1f} dB",
        )
    ).rstrip()


def _run(
    options: Options, make: Callable[[Options], Subject], timed_dense_steps: int | None = None
) -> Iterator[Measurement]:
    subject = make(options)
    yield from rows(measure(subject, options, timed_dense_steps), subject, options)


def _embedded(options: Options, grid: tuple[int, int]) -> Subject:
    return embedded_subject(options.device, grid, options.seed)


def _quarter(options: Options) -> Subject:
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    return random_subject(FLUX_QUARTER, options.device, dtype, (64, 64), options.seed, text_tokens=128)


def _flux(options: Options) -> Subject:
    return random_subject(FLUX_DEV, options.device, torch.bfloat16, (64, 64), options.seed, text_tokens=512)


def no_embedded(options: Options) -> str | None:
    """Returns why the embedded model cannot be measured, or None."""
    folder = embedded_model()
    return None if (folder / "model_index.json").is_file() else f"no embedded model in {folder}"


def no_large_cuda(options: Options) -> str | None:
    """Returns why 12 billion weights cannot be measured, or None."""
    if options.device.type != "cuda":
        return "no CUDA device"
    gib = torch.cuda.get_device_properties(options.device).total_memory / 2**30
    return None if gib >= _FLUX_GIB else f"needs {_FLUX_GIB} GiB of GPU memory, got {gib:.0f}"


CASES: tuple[Case, ...] = (
    *(
        Case(
            group="denoise",
            size="small",
            name=f"embedded model, {side}x{side} tokens",
            run=functools.partial(_run, make=functools.partial(_embedded, grid=(side, side)), timed_dense_steps=timed),
            why_not=no_embedded,
        )
        for side, timed in (
            (32, None),
            (64, 5),
        )  # 64x64: the model was not trained for this size, and dense steps take minutes
    ),
    Case(
        group="denoise",
        size="large",
        name="random transformer of width 768 and 3 blocks, 64x64 tokens",
        run=functools.partial(_run, make=_quarter, timed_dense_steps=3),
        why_not=lambda options: None,
    ),
    Case(
        group="denoise",
        size="flux",
        name="FLUX.1-dev's size (12 billion random weights, bfloat16), 1024x1024",
        run=functools.partial(_run, make=_flux),
        why_not=no_large_cuda,
    ),
)
