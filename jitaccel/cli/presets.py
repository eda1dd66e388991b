"""List the presets: steps, what the network sees, and what they cost on FLUX.1-dev."""

from __future__ import annotations

import argparse

from . import options

_UNIT = 16  # side of a token in pixels on FLUX.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--size", default="1024x1024", metavar="HxW", help="height and width in pixels")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table, computed from the presets."""
    from ..loading import PictureSizes
    from ..method.presets import DENSE_STEPS
    from ..patches.flux.flops import FLUX_DEV_TEXT_TOKENS, flux_dev_flops
    from ..speed.overview import FEWER_STEPS, overview

    height, width = options.parse_size(arguments.size)
    options.check_size((height, width), PictureSizes(unit=_UNIT, side=1024))
    rows: list[tuple[str, ...]] = [
        ("preset", "steps", "what the network sees", "cost", f"vs {DENSE_STEPS}", f"vs {FEWER_STEPS}")
    ]
    for row in overview((height // _UNIT, width // _UNIT), flux_dev_flops):
        rows.append((row.name, str(row.steps), row.shown, f"{row.cost:.1f}", *(f"{x:.1f}x" for x in row.speedups)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for cells in rows:
        left = [cell.ljust(width) for cell, width in zip(cells[:3], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
        print("  ".join([*left, *right]))
    print(
        f"cost: in dense steps of FLUX.1-dev at {height}x{width}, computed from its operations with "
        f"{FLUX_DEV_TEXT_TOKENS} text tokens, not measured."
    )
    print(f"vs {DENSE_STEPS}, vs {FEWER_STEPS}: the ratio of operations to so many dense steps.")
    return 0
