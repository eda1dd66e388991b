"""Draws the two pictures of the demo: methods side by side, and the active tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from ..generation.stats import Stats

Pixels = NDArray[Any]
_GAP_PX, _LABEL_PX = 8, 22
_INK, _PAPER = (20, 20, 20), (255, 255, 255)
_DIMMED = 0.22  # brightness of an inactive token


def grid_picture(rows: Sequence[Sequence[Pixels]], columns: Sequence[str], row_labels: Sequence[str]) -> Image.Image:
    """Returns one sheet of pictures `(h, w, 3)`, in [0, 1] or uint8, with a label above each column and each row."""
    height, width = rows[0][0].shape[:2]
    row_px = height + _GAP_PX + _LABEL_PX
    size = (_GAP_PX + len(columns) * (width + _GAP_PX), _LABEL_PX + len(rows) * row_px + _GAP_PX)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        left = _GAP_PX + column * (width + _GAP_PX)
        _write(pen, (left, 4), label, width)
        for row, pictures in enumerate(rows):
            sheet.paste(Image.fromarray(to_bytes(pictures[column])), (left, 2 * _LABEL_PX + row * row_px))
    for row, label in enumerate(row_labels):
        _write(pen, (_GAP_PX, _LABEL_PX + row * row_px + 2), label, size[0] - 2 * _GAP_PX)
    return sheet


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int) -> None:
    """Writes a label, in a smaller font or cut off if needed to fit."""
    for size in (15, 13, 11):
        font = ImageFont.load_default(size)
        if pen.textlength(text, font) <= width:
            break
    while len(text) > 4 and pen.textlength(text, font) > width:
        text = text[:-4] + "..."
    pen.text(corner, text, fill=_INK, font=font)


def show_active(picture: Pixels, anchors: Sequence[int] | NDArray[np.int64], grid: tuple[int, ...]) -> Pixels:
    """Returns the picture with every token that did not enter the network dimmed, as uint8.

    anchors: raster indices on the grid (grid_h, grid_w); each cell is the patch of one token. Raises ValueError for a
    grid with frames, because a picture shows only one.
    """
    if len(grid) != 2:
        raise ValueError(f"show_active: grid must be (grid_h, grid_w), got {grid}; show one frame")
    active = np.zeros(grid[0] * grid[1], bool)
    active[np.asarray(anchors)] = True
    cell_h, cell_w = picture.shape[0] // grid[0], picture.shape[1] // grid[1]
    mask = np.kron(active.reshape(grid), np.ones((cell_h, cell_w), bool))[..., None]
    pixels = to_bytes(picture)
    dimmed = (255 - (255 - pixels.astype(np.float32)) * _DIMMED).astype(np.uint8)
    return np.where(mask, pixels, dimmed)


def show_pooled(picture: Pixels, factor: int) -> Pixels:
    """Returns the picture as a network sees it after a reduction by `factor`: each block is its mean, uint8.

    If the sides are not divisible, the blocks at the last row and column are smaller.
    """
    pixels: Pixels = to_bytes(picture).astype(np.float64)
    for axis in (0, 1):
        starts = np.arange(0, pixels.shape[axis], factor)
        sizes = np.diff(np.append(starts, pixels.shape[axis]))
        shape = [1, 1, 1]
        shape[axis] = len(starts)
        means = np.add.reduceat(pixels, starts, axis=axis) / sizes.reshape(shape)
        pixels = means.repeat(sizes, axis=axis)
    return pixels.round().astype(np.uint8)


def show_stage(picture: Pixels, stats: Stats, stage: int, image: int = 0) -> Pixels:
    """Returns the picture as a stage of a generation showed it, with left-out tokens dimmed or reduced; uint8.

    stats: of the generation. image: index of `picture` in its batch.
    """
    factor = stats.config.pooling_of(stage)
    if factor > 1:
        return show_pooled(picture, factor)
    return show_active(picture, stats.anchors[stage][image].cpu().numpy(), stats.grid)


def to_bytes(picture: Pixels) -> Pixels:
    """Returns a picture as uint8; floats are in [0, 1], uint8 is returned unchanged."""
    if picture.dtype == np.uint8:
        return picture
    return (np.clip(picture, 0.0, 1.0) * 255.0).round().astype(np.uint8)
