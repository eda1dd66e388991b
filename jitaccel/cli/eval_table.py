"""The table of `jitaccel eval`: what each method costs and how good it is, with intervals, and who beats whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quality.metrics import frechet_distance
from ..quality.statistics import Estimate, bootstrap, mean_of, paired_p_value, share_of

Rows = Sequence[Mapping[str, Any]]
_HEAD = (
    "method|steps|cost in dense steps|seconds|attributes shown, %|Frechet to reference|Frechet to data|PSNR, dB|SSIM|"
    "perceptual|detail, dB|seams|against|attributes more, %|p"
)
_RESAMPLES = 200  # of a Frechet distance, which takes a decomposition each
_FOOT = """
Means over {count} prompts, with 95 % bootstrap intervals. Reference: {reference}, from the same noise. Cost: FLOPs
with attention and text, in dense steps. Frechet: squared distance of the judge's features to those of the reference's
pictures, and of {data} drawn scenes; resampling widens it, so its intervals lie high. perceptual: distance of the
judge's feature maps to the reference, 0 to 2. detail: power above half the Nyquist frequency, against the reference.
seams: how steep borders between tokens of different stages are, over those within a stage. against: the dense method
on the presets' levels whose cost is nearest; attributes more: the paired difference to it, and p by sign flips.
"""


def table(rows: Rows, methods: Sequence[str], data: NDArray[Any]) -> str:
    """Returns the table in Markdown. rows: of each method in turn, for the same prompts. data: features (P, F)."""
    of = {name: [row for row in rows if row["method"] == name] for name in methods}
    reference = methods[0]
    step = _mean(of[reference], "gflop") / of[reference][0]["steps"]
    lines = [_HEAD.split("|"), ["---"] * len(_HEAD.split("|"))]
    lines += [_line(name, of, reference, step, data) for name in methods]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + _FOOT.format(count=len(of[reference]), reference=reference, data=len(data))


def _line(name: str, of: Mapping[str, Rows], reference: str, step: float, data: NDArray[Any]) -> list[str]:
    rows, features = of[name], _features(of[name])
    is_reference = name == reference
    control = _control(name, of)
    shown = share_of(_column(rows, "shown"), _column(rows, "claimed"))
    seams = [row["seam"] for row in rows if row["seam"] is not None]
    return [
        name,
        str(rows[0]["steps"]),
        f"{_mean(rows, 'gflop') / step:.2f}",
        f"{_mean(rows, 'denoise_s'):.2f}",
        _shown(shown, 100.0, 1),
        "" if is_reference else _shown(_frechet(features, _features(of[reference]), is_paired=True), 1.0, 2),
        _shown(_frechet(features, data, is_paired=False), 1.0, 2),
        *("" if is_reference else _shown(mean_of(_column(rows, key)), 1.0, digits) for key, digits in _BESIDE),
        _shown(mean_of(np.array(seams)), 1.0, 2) if seams else "",
        *(("", "", "") if control is None else _against(rows, control, of[control])),
    ]


_BESIDE = (("psnr_db", 1), ("ssim", 3), ("perceptual", 3), ("spectrum_db", 1))


def _control(name: str, of: Mapping[str, Rows]) -> str | None:
    """Returns the dense method on the presets' levels whose cost is nearest to that of a sparse one, or None."""
    if of[name][0]["config"]["densities"] == [1.0]:
        return None
    controls = [other for other in of if other.startswith("beta:")]
    cost = _mean(of[name], "gflop")
    return min(controls, key=lambda other: abs(_mean(of[other], "gflop") - cost), default=None)


def _against(rows: Rows, name: str, control: Rows) -> tuple[str, str, str]:
    shares = [_column(each, "shown") / np.maximum(_column(each, "claimed"), 1) for each in (rows, control)]
    p_value = paired_p_value(*shares)
    shown = f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"
    return name, _shown(mean_of(shares[0] - shares[1]), 100.0, 1), shown


def _frechet(features: NDArray[Any], other: NDArray[Any], *, is_paired: bool) -> Estimate:
    """Returns a distance with its interval over prompts; the other side is resampled with it where it is paired."""
    measure: Callable[[NDArray[Any]], float] = lambda chosen: frechet_distance(  # noqa: E731
        features[chosen], other[chosen] if is_paired else other
    )
    return bootstrap(len(features), measure, resamples=_RESAMPLES)


def _features(rows: Rows) -> NDArray[Any]:
    return np.array([row["features"] for row in rows])


def _column(rows: Rows, name: str) -> NDArray[Any]:
    return np.array([row[name] for row in rows], np.float64)


def _mean(rows: Rows, name: str) -> float:
    return float(_column(rows, name).mean())


def _shown(estimate: Estimate, scale: float, digits: int) -> str:
    value, low, high = (scale * each for each in (estimate.value, estimate.low, estimate.high))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
