"""The record: one generation, dense and sparse, in every way of running it. Each combination is a separate case.

Cases can be resumed one by one (`--resume`), because a GPU may be available for minutes only. `dense` is the control:
it gets the same compiler and CUDA graphs as the sparse presets. Rows hold measurements only; ratios are computed where
they are shown (`benchmarks/table.py`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import jitaccel
from jitaccel.evaluation.comparison import TimedCall, timed

from ..pipelines import FLUX_DEV, embedded_subject, random_call, random_pipeline
from ..registry import Case, Measurement, Options, percentiles
from .denoise import no_embedded, no_large_cuda


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to make one picture.

    Attributes:
        method: "dense" or a preset.
        way: "eager" (dense: the unpatched pipeline; sparse: the model's own forward on the anchors), "packed",
            "compiled", "captured" (compiled, and replayed as CUDA graphs), or "float8" (captured, with torchao's
            float8 weights and activations).
        steps: Number of steps of the dense method.
    """

    method: str
    way: str
    steps: int = 0

    @property
    def name(self) -> str:
        method = f"dense, {self.steps} steps" if self.method == "dense" else self.method
        return f"{method}, {self.way}"


# Most important first, because a device may be available for minutes only.
CONTENDERS = (
    Contender(method="dense", steps=50, way="eager"),
    Contender(method="dense", steps=50, way="captured"),
    Contender(method="7x", way="captured"),
    Contender(method="dense", steps=6, way="captured"),
    Contender(method="7x", way="packed"),
    Contender(method="7x", way="eager"),
    Contender(method="dense", steps=50, way="compiled"),
    Contender(method="7x", way="compiled"),
    Contender(method="4x", way="captured"),
    Contender(method="7x", way="float8"),
    Contender(method="dense", steps=6, way="compiled"),
    Contender(method="4x", way="packed"),
    Contender(method="4x", way="eager"),
    Contender(method="4x", way="compiled"),
    Contender(method="4x", way="float8"),
)

Make = Callable[[Options, bool], tuple[Any, Mapping[str, Any]]]
"""Returns a pipeline, quantised or not, and the arguments of a call."""


def measure(options: Options, contender: Contender, make: Make, grid: tuple[int, int]) -> Iterator[Measurement]:
    """Yields one row: the contender's generations, of which the first compiles, or the reason for having none."""
    fields: dict[str, Any] = {
        "method": contender.method,
        "way": contender.way,
        "grid": grid,
        "batch": 1,
        "seed": options.seed,
        "repeats": options.repeat,
    }
    try:
        fields |= _measured(options, contender, *make(options, contender.way == "float8"))
    except Exception as error:  # a failing case must not stop the other cases
        fields["error"] = _reason(error)
    if "error" in fields and contender.way == "captured":
        fields |= _without_graphs(options, contender, make, fields.pop("error"))
    yield Measurement(line=_line(fields), fields=fields)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _without_graphs(options: Options, contender: Contender, make: Make, reason: str) -> dict[str, Any]:
    """Returns the fields of a contender that could not be captured: compiled only, with the reason."""
    try:
        found = _measured(options, replace(contender, way="compiled"), *make(options, False))
    except Exception as error:
        return {"error": f"{reason}; without graphs: {_reason(error)}"}
    return {**found, "way": "compiled", "not_captured": reason}


def _measured(options: Options, contender: Contender, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    device = options.device

    def generation() -> TimedCall:
        generator = torch.Generator().manual_seed(options.seed)
        steps = contender.steps if handle is None else handle.config.steps
        return timed(pipe, steps, handle, generator=generator, **call)

    forget_earlier_cases(device)
    with applied(pipe, contender) as handle, torch.no_grad():
        start = time.perf_counter()
        generation()
        first_s = time.perf_counter() - start
        made = [generation() for _ in range(options.repeat)]
        memory = peaks(device)
        stats = None if handle is None else handle.stats()
    median, low, high = percentiles([g.denoise_s for g in made])
    compiled = None if stats is None or stats.compiled is None else asdict(stats.compiled)
    return {
        "steps": contender.steps if stats is None else len(stats.steps),
        "text_tokens": _text_tokens(call),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "attention": None if stats is None else stats.attention,
        "denoise_median_s": round(median, 5),
        "denoise_p20_s": round(low, 5),
        "denoise_p80_s": round(high, 5),
        "first_s": round(first_s, 3),
        "first_over_later_s": round(first_s - percentiles([g.whole_s for g in made])[0], 3),
        "network_median_s": _part(made, "network_s"),
        "outside_median_s": _part(made, "outside_s"),
        "outside_share_of_sparse_steps": _outside_share(made),
        "gflop": round(made[0].flops / 1e9, 3),
        "tflop_per_s": round(made[0].flops / 1e12 / median, 3),
        **memory,
        "compiled": compiled,
    }


def forget_earlier_cases(device: torch.device) -> None:
    """Frees everything that earlier cases compiled and captured, and resets the peaks of memory."""
    torch.compiler.reset()  # the compiler keeps compiled code and CUDA graphs longer than the compiled function
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, float | None]:
    """Returns the peaks of memory since the last reset, weights included; None on the CPU.

    The first picture is included, because a CUDA graph's memory is allocated during capture and only reserved later.
    """
    if device.type != "cuda":
        return {"peak_memory_mib": None, "peak_reserved_mib": None}
    return {
        "peak_memory_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1),
        "peak_reserved_mib": round(torch.cuda.max_memory_reserved(device) / 2**20, 1),
    }


def _part(made: list[TimedCall], name: str) -> float | None:
    """Returns the median of `network_s` or `outside_s`; None if nothing was applied that measures them."""
    found = [getattr(g.stats, name) for g in made if g.stats is not None]
    return round(percentiles(found)[0], 5) if found else None


def _text_tokens(call: Mapping[str, Any]) -> int:
    """Returns the number of text tokens."""
    return int(call["prompt_embeds"].shape[1] if "prompt_embeds" in call else call["max_sequence_length"])


@contextlib.contextmanager
def applied(pipe: Any, contender: Contender) -> Iterator[Any]:
    """Applies a contender to the pipeline within this context; yields the handle, or None if nothing is applied."""
    if contender.method == "dense" and contender.way == "eager":
        yield None
        return
    if contender.method == "dense" and contender.way == "compiled":
        with compiled_as_usual(pipe):
            yield None
        return
    preset: Any = contender.method
    if contender.method == "dense":
        preset = jitaccel.JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=contender.steps)
    settings: dict[str, Any] = {
        "eager": {"execution": "indexed"},
        "packed": {"execution": "packed"},
        "compiled": {"compile": {"graphs": False}},
        "captured": {"compile": {"graphs": True}},
        "float8": {"compile": {"graphs": True}},
    }[contender.way]
    with jitaccel.apply(pipe, preset, strict=True, **settings) as handle:
        yield handle


@contextlib.contextmanager
def compiled_as_usual(pipe: Any) -> Iterator[None]:
    """Compiles the whole transformer, as a user without jitaccel would."""
    plain = pipe.transformer
    before = set(vars(plain))
    pipe.transformer = torch.compile(plain, fullgraph=True, dynamic=False)
    try:
        yield
    finally:
        pipe.transformer = plain
        for name in vars(plain).keys() - before:
            delattr(plain, name)  # the compiler leaves attributes on the module
        torch.compiler.reset()


def _outside_share(made: list[TimedCall]) -> float | None:
    """Returns the share of sparse steps' time outside the transformer; None without sparse steps."""
    steps = [s for g in made if g.stats for s in g.stats.steps if s.stage < len(g.stats.anchors) - 1]
    total = sum(step.network_s + step.outside_s for step in steps)
    return sum(step.outside_s for step in steps) / total if total else None


def _line(f: Mapping[str, Any]) -> str:
    if "error" in f:
        return f"not measured: {f['error']}"
    outside, peak = f["outside_share_of_sparse_steps"], f["peak_memory_mib"]
    parts = [
        f"{f['steps']:3d} steps {f['denoise_median_s']:8.3f} s ({f['denoise_p20_s']:.3f} to {f['denoise_p80_s']:.3f})",
        f"{f['tflop_per_s']:.2f} TFLOP/s",
        f"first picture {f['first_over_later_s']:.1f} s more",
    ]
    parts += [] if outside is None else [f"outside {100 * outside:.1f} % of sparse steps"]
    parts += [] if peak is None else [f"peak {peak:,.0f} MiB"]
    parts += [f"without graphs, since {f['not_captured']}"] if "not_captured" in f else []
    return ", ".join(parts)


class Cached:
    """Makes a random pipeline once for consecutive cases that share it, and frees it before making the next.

    Quantising changes weights in place, so a quantised pipeline is a different one.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._pipe: Any = None

    def __call__(
        self, options: Options, is_float8: bool, *, model: Mapping[str, Any], grid: tuple[int, int], text_tokens: int
    ) -> tuple[Any, Mapping[str, Any]]:
        key = (options.device, options.seed, is_float8, id(model))
        if key != self._key:
            self._key = self._pipe = None
            gc.collect()
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
            pipe = random_pipeline(model, options.device, torch.bfloat16, options.seed)
            if is_float8:
                quantise(pipe.transformer)
            self._key, self._pipe = key, pipe
        return self._pipe, random_call(self._pipe, grid, options.seed, text_tokens)


def quantise(transformer: Any) -> None:
    """Makes the blocks' linear layers multiply in float8, scaled by row; embeddings and output are unchanged."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    def is_chosen(module: Any, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "transformer_blocks" in name and "norm" not in name

    quantize_(transformer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=is_chosen)


def _embedded(options: Options, is_float8: bool, *, grid: tuple[int, int]) -> tuple[Any, Mapping[str, Any]]:
    subject = embedded_subject(options.device, grid, options.seed)
    return subject.pipe, {**subject.call, "output_type": "latent"}


def _why_not(options: Options, contender: Contender, missing: Callable[[Options], str | None]) -> str | None:
    if (reason := missing(options)) is not None:
        return reason
    if contender.way != "float8":
        return None
    if options.device.type != "cuda" or torch.cuda.get_device_capability(options.device) < (8, 9):
        return "float8 needs a CUDA device of compute capability 8.9"
    return None if importlib.util.find_spec("torchao") else "torchao is not installed"


def _case(
    size: str,
    what: str,
    contender: Contender,
    make: Make,
    grid: tuple[int, int],
    missing: Callable[[Options], str | None],
) -> Case:
    return Case(
        group="record",
        size=size,
        name=f"{what}: {contender.name}",
        run=functools.partial(measure, contender=contender, make=make, grid=grid),
        why_not=functools.partial(_why_not, contender=contender, missing=missing),
    )


def _cases() -> Iterator[Case]:
    make: Any = functools.partial(_embedded, grid=(32, 32))
    for contender in (contender for contender in CONTENDERS if contender.way != "float8"):  # needs bfloat16
        yield _case("small", "embedded model, 32x32 tokens", contender, make, (32, 32), no_embedded)
    cached = Cached()
    for side in (64, 128):
        make = functools.partial(cached, model=FLUX_DEV, grid=(side, side), text_tokens=512)
        # Quantised ones last, because each change between them makes 12 billion weights again.
        for contender in sorted(CONTENDERS, key=lambda contender: contender.way == "float8"):
            what = f"FLUX.1-dev's size (12 billion random weights, bfloat16), {16 * side}x{16 * side}"
            yield _case("flux", what, contender, make, (side, side), no_large_cuda)


CASES = tuple(_cases())
