"""Packed sequences: the positions of tokens, and that no token is lost."""

from __future__ import annotations

import pytest
import torch

from jitaccel.execution.packing import PackedLayout, Segments

CPU = torch.device("cpu")
LAYOUTS = [
    ((3,), (5,)),
    ((3, 3), (5, 5)),
    ((3, 1, 2), (5, 2, 4)),
    ((2, 4), (4, 2)),  # documents equally long, their parts not
    ((0, 0), (5, 1)),
    ((0, 3), (1, 0)),
]


def layout_of(lengths: tuple[tuple[int, ...], tuple[int, ...]]) -> PackedLayout:
    return PackedLayout.of(*lengths, CPU)


@pytest.mark.parametrize("lengths", LAYOUTS)
def test_documents_hold_text_then_image_of_each_segment(lengths: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    layout = layout_of(lengths)
    text = torch.cat([torch.full((n,), 10 * k) for k, n in enumerate(lengths[0])])
    image = torch.cat([torch.full((n,), 10 * k + 1) for k, n in enumerate(lengths[1])])
    expected = [
        10 * k + part for k, n in enumerate(zip(*lengths, strict=True)) for part in (0, 1) for _ in range(n[part])
    ]
    assert layout.join(text, image).tolist() == expected


@pytest.mark.parametrize("lengths", LAYOUTS)
def test_split_undoes_join(lengths: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    layout = layout_of(lengths)
    text, image = torch.randn(sum(lengths[0]), 2, 3), torch.randn(sum(lengths[1]), 2, 3)
    documents = layout.join(text, image)
    back = layout.split(documents)
    assert torch.equal(back[0], text) and torch.equal(back[1], image)
    assert torch.equal(layout.image_of(documents), image)


def test_cumulative_lengths_are_what_kernels_expect() -> None:
    layout = layout_of(((3, 1, 2), (5, 2, 4)))
    assert layout.cu_seqlens.tolist() == [0, 8, 11, 17] and layout.cu_seqlens.dtype == torch.int32
    assert layout.max_seqlen == 8 and type(layout.max_seqlen) is int
    assert layout.lengths == (8, 3, 6)


@pytest.mark.parametrize("lengths", [(4,), (3, 3), (3, 1, 2), (0, 2)])
def test_values_of_segments_reach_their_tokens(lengths: tuple[int, ...]) -> None:
    segments = Segments.of(lengths, CPU)
    x, values = torch.randn(sum(lengths), 5), torch.randn(len(lengths), 5)
    spread, segment = segments.beside(x, values)
    each = torch.cat([values[k].expand(n, 5) for k, n in enumerate(lengths)])
    assert torch.equal(segments.flat(spread * segment), x * each)
    assert segments.segment_of.tolist() == [k for k, n in enumerate(lengths) for _ in range(n)]


def test_equal_segments_are_not_copied() -> None:
    x = torch.randn(6, 5)
    spread, _ = Segments.of((3, 3), CPU).beside(x, torch.randn(2, 5))
    assert spread.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("lengths", [((), ()), ((1, 2), (3,)), ((0, 1), (0, 2))])
def test_segments_without_tokens_are_refused(lengths: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="every segment must have text and image lengths"):
        layout_of(lengths)
