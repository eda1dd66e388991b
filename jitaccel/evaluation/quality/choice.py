"""Selects the prompts and methods of an evaluation that are worth showing, with the reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .rows import QUALITIES, ByMethod, Known, Quality, Row, Rows, by_method, control_of, method_kind

_COLUMNS, _SPARSE = 8, 2
_DISTANCES = {"perceptual": "perceptual distance", "lpips": "LPIPS", "ssim": "1 - SSIM"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """Prompts shown for one reason. notes: for each prompt, why it was selected."""

    heading: str
    prompts: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """The quality of a single picture, higher being better: the share of attributes shown, or a quality of its row."""

    name: str
    quality: Quality

    def __call__(self, row: Row) -> float:
        """Returns the score of a row, in the units of `points`."""
        if self.name == "attributes":
            return float(row["shown"]) / max(float(row["claimed"]), 1.0)
        return math.copysign(1.0, self.quality.best or 1.0) * float(row[self.name])

    @property
    def title(self) -> str:
        """Name of the criterion."""
        return "the share of attributes shown" if self.name == "attributes" else self.quality.title

    def points(self, difference: float, sign: str = "") -> str:
        """Returns a difference of two scores in words."""
        return f"{100 * difference:{sign}.0f} points" if self.name == "attributes" else f"{difference:{sign}.2f}"

    def caption(self, row: Row) -> str:
        """Returns the caption of a picture."""
        return f"{row['shown']} of {row['claimed']}" if self.name == "attributes" else f"{row[self.name]:.2f}"


@dataclass(frozen=True, kw_only=True)
class Distance:
    """The distance of a picture from the reference's, 0 for the reference, by a field of its row."""

    name: str
    title: str

    def __call__(self, row: Row) -> float:
        """Returns the distance of a row."""
        if row.get(self.name) is None:
            return 0.0
        return 1.0 - float(row[self.name]) if self.name == "ssim" else float(row[self.name])


def criterion_of(rows: Rows, known: Known = QUALITIES) -> Criterion | None:
    """Returns the criterion for choosing prompts: attributes, or the first known quality that every row has."""
    for name, quality in known.items():
        fields = ("shown", "claimed") if name == "attributes" else (name,)
        is_one_sided = quality.best is not None and math.isinf(quality.best)
        if is_one_sided and rows and all(row.get(field) is not None for row in rows for field in fields):
            return Criterion(name=name, quality=quality)
    return None


def distance_of(rows: Rows) -> Distance | None:
    """Returns the first distance to the reference that the rows have, or None."""
    for name, title in _DISTANCES.items():
        if any(row.get(name) is not None for row in rows):
            return Distance(name=name, title=title)
    return None


def columns_of(rows: Rows, methods: Sequence[str]) -> list[str]:
    """Returns the methods to show, at most 8: the reference, the sparse ones with their controls, then others.

    They are in the order of `methods`.
    """
    of = by_method(rows, methods, asker="contact_sheet")
    wanted = [methods[0]]
    for name in methods:
        if method_kind(of[name][0]) == "sparse":
            wanted += [name, control_of(name, of) or name]
    chosen = [*dict.fromkeys([*wanted, *methods])][:_COLUMNS]
    return [name for name in methods if name in chosen]


def sections(rows: Rows, methods: Sequence[str], count: int = 3, known: Known = QUALITIES) -> list[Section]:
    """Returns the prompts to show, with the reasons. A prompt may be in several sections.

    First the prompts with the widest spread of scores over the shown methods, then those with the largest distance of
    any method from the reference. Then, for each of the first two sparse methods, the prompts with the largest gains
    and losses in score against the dense control. Ties are broken by the distance. Without scores and distances, the
    first prompts are shown.

    Raises:
        ValueError: If the rows do not have the same 2 or more prompts for every method, or if count is not positive.
    """
    if count < 1:
        raise ValueError(f"contact_sheet: count must be 1 or more, got {count}; say how many prompts a section shows")
    names = columns_of(rows, methods)
    of = by_method(rows, names, asker="contact_sheet")
    rows = [row for some in of.values() for row in some]
    criterion, distance = criterion_of(rows, known), distance_of(rows)
    if criterion is None and distance is None:
        first = of[names[0]][:count]
        return [_section("The first prompts, because the rows have no scores to choose by", first, [""] * len(first))]
    found = _differ(of, criterion, distance, count) if len(of) > 1 else []
    for name in [name for name in names if method_kind(of[name][0]) == "sparse"][:_SPARSE]:
        found += _against(name, control_of(name, of), of, criterion, distance, count)
    return found or [_section("The first prompts, because there is one method", of[names[0]][:count], [""] * count)]


def _differ(of: ByMethod, criterion: Criterion | None, distance: Distance | None, count: int) -> list[Section]:
    together = [*zip(*of.values(), strict=True)]
    far = [0.0 if distance is None else max(map(distance, some)) for some in together]
    found = []
    if criterion is not None:
        spread = [max(map(criterion, some)) - min(map(criterion, some)) for some in together]
        chosen = sorted(range(len(together)), key=lambda k: (-spread[k], -far[k], k))[:count]
        heading = f"Where the methods differ most in {criterion.title}"
        notes = [f"spread {criterion.points(spread[k])}" for k in chosen]
        found.append(_section(heading, [together[k][0] for k in chosen], notes))
    if distance is not None:
        chosen = sorted(range(len(together)), key=lambda k: (-far[k], k))[:count]
        heading = f"Where a method is farthest from the reference, by {distance.title}"
        notes = [f"largest {distance.title} {far[k]:.2f}" for k in chosen]
        found.append(_section(heading, [together[k][0] for k in chosen], notes))
    return found


def _against(
    name: str, control: str | None, of: ByMethod, criterion: Criterion | None, distance: Distance | None, count: int
) -> list[Section]:
    """Returns the best and worst prompts of a sparse method against its dense control, at most half of all each."""
    if control is None:
        return []
    pairs = [*zip(of[name], of[control], strict=True)]
    gains = [0.0 if criterion is None else criterion(own) - criterion(other) for own, other in pairs]
    farther = [0.0 if distance is None else distance(own) - distance(other) for own, other in pairs]
    order = sorted(range(len(pairs)), key=lambda k: (-gains[k], farther[k], k))
    count = min(count, len(order) // 2)
    found = []
    for word, chosen in (("best", order[:count]), ("worst", order[::-1][:count])):
        if criterion is not None:
            notes = [f"{criterion.points(gains[k], '+')} against {control}" for k in chosen]
        else:
            title = "" if distance is None else distance.title
            notes = [f"{title} {farther[k]:+.2f} against {control}" for k in chosen]
        heading = f"{name} at its {word} against {control}, the dense control nearest to it in cost"
        found.append(_section(heading, [of[name][k] for k in chosen], notes))
    return found


def _section(heading: str, rows: Rows, notes: Sequence[str]) -> Section:
    return Section(
        heading=heading, prompts=tuple(int(row["prompt_index"]) for row in rows), notes=(*notes[: len(rows)],)
    )
