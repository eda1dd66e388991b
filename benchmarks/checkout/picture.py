"""Draws the README's picture: 50 dense steps, 7x, and the network's input in each step of 7x.

    python -m benchmarks.checkout.picture docs/7x.jpg

It uses the embedded model, the README's prompt, which the model draws well, and the first seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PROMPT = "autumn mountains at dawn with a meadow with yellow flowers, a yellow balloon on the left and the sea"
PRESETS = ("dense", "7x")
SEED = 0
_SIDE, _GAP, _LABEL, _EDGE = 384, 20, 30, 14
_THUMB, _BETWEEN = 116, 7  # for a step with all tokens; a step with a quarter of the tokens is half as wide
_PAPER, _INK, _SOFT, _LINE = (255, 255, 255), (26, 29, 36), (93, 101, 117), (255, 255, 255, 48)
_MOST_BYTES = 300_000


def main(argv: list[str] | None = None) -> int:
    """Writes the picture and prints its file size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JPEG to write")
    out = parser.parse_args(argv).out
    from jitaccel.app.making import Wanted, make_each
    from jitaccel.loading import EMBEDDED_TEXT_TOKENS, load_pipeline, picture_side

    pipe = load_pipeline(None)
    pipe.set_progress_bar_config(disable=True)
    side = picture_side(pipe)
    wanted = Wanted(prompt=PROMPT, height=side, width=side, seed=SEED, text_tokens=EMBEDDED_TEXT_TOKENS)
    dense = next(make_each(pipe, PRESETS[:1], wanted, previews="colours"))
    fast = next(make_each(pipe, PRESETS[1:], wanted, progress=True))
    sheet(dense, fast).save(out, quality=90, optimize=True)
    size = out.stat().st_size
    print(f"{out}: {size / 1000:.0f} kB; dense {dense.playback.stats.dense_steps:.1f}, 7x {_cost(fast)} dense steps")
    return 0 if size <= _MOST_BYTES else 1


def sheet(dense: Any, fast: Any) -> Image.Image:
    """Returns the sheet for two `MadePicture`: the dense picture, and the picture whose steps are shown."""
    steps = len(fast.playback.moments)
    labels = (
        f"{len(dense.playback.moments)} dense steps",
        f"7x: {steps} steps, the cost of {_cost(fast)}",
        "its tokens in each step, over what it predicts",
    )
    size = (2 * _EDGE + 3 * _SIDE + 2 * _GAP, 2 * _EDGE + _LABEL + _SIDE)
    page = Image.new("RGB", size, _PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(18)
    lefts = [_EDGE + column * (_SIDE + _GAP) for column in range(3)]
    for left, label in zip(lefts, labels, strict=True):
        pen.text((left, _EDGE - 2), label, fill=_INK, font=font)
    for left, made in zip(lefts, (dense, fast), strict=False):
        page.paste(made.image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), (left, _EDGE + _LABEL))
    _draw_steps(page, fast.playback, (lefts[2], _EDGE + _LABEL))
    return page


def _draw_steps(page: Image.Image, playback: Any, corner: tuple[int, int]) -> None:
    """Draws a thumbnail of each step: the clean estimate under the token grid, with all tokens drawn equally large."""
    left, top = corner
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for stage, anchors in enumerate(playback.stats.anchors):
        moments = [moment for moment in playback.moments if moment.stats.stage == stage]
        side = _THUMB // playback.stats.config.pooling_of(stage)
        columns = (_SIDE + _BETWEEN) // (side + _BETWEEN)
        kind = "a picture of half the size" if side < _THUMB else "the whole picture"
        pen.text((left, top), f"{len(moments)} steps: {anchors.shape[1]} tokens, {kind}", fill=_SOFT, font=font)
        top += 22
        for place, moment in enumerate(moments):
            row, column = divmod(place, columns)
            where = (left + column * (side + _BETWEEN), top + row * (side + _BETWEEN))
            page.paste(_thumb(moment.clean[0], side, round(np.sqrt(anchors.shape[1]))), where)
        top += -(-len(moments) // columns) * (side + _BETWEEN) + 4


def _thumb(picture: Any, side: int, tokens: int) -> Image.Image:
    """Returns a step's picture with lines between its `tokens` x `tokens` tokens."""
    thumb = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    lines = Image.new("RGBA", thumb.size)
    pen = ImageDraw.Draw(lines)
    for token in range(1, tokens):
        at = round(token * side / tokens)
        pen.line([(at, 0), (at, side)], fill=_LINE)
        pen.line([(0, at), (side, at)], fill=_LINE)
    return Image.alpha_composite(thumb, lines).convert("RGB")


def _cost(made: Any) -> str:
    return f"{made.playback.stats.dense_steps:.1f}"


if __name__ == "__main__":
    sys.exit(main())
