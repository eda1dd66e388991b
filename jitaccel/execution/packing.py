"""Sequences of different length as one: where each token of a packed sequence comes from.

A segment is what one image's forward sees: its text tokens and its image tokens. A model keeps text and image tokens
apart, segment after segment in each (`text`, `image`), where their weights differ, and needs them together for
attention: a document `[text_k, image_k]` for each segment, one after the other.

Everything is worked out when a layout is made, so that nothing but tensors and plain numbers is left to a compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Tokens of several segments in one sequence `(sum of lengths, ...)`.

    lengths: tokens of each segment. is_even: whether all are equally long. segment_of: the segment of each token, (T,)
    int64.
    """

    lengths: tuple[int, ...]
    is_even: bool
    segment_of: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        segments = torch.repeat_interleave(torch.tensor([*lengths], dtype=torch.int64, device="cpu"))
        return cls(tuple(lengths), len(set(lengths)) == 1, segments.to(device))

    def beside(self, x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Returns tokens `x` (T, D) and `values` (S, D), one a segment, in shapes that broadcast: pointwise work.

        `flat` brings a result back to (T, D). Nothing is copied where the segments are equally long.
        """
        if self.is_even:
            return (x.unflatten(0, (len(self.lengths), -1)), *(value.unsqueeze(1) for value in values))
        return (x, *(value.index_select(0, self.segment_of) for value in values))

    def flat(self, x: Tensor) -> Tensor:
        """Returns the result of work on what `beside` returned as `(T, D)`."""
        return x.flatten(0, 1) if self.is_even else x


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where the tokens of several segments stand; made once for each stage and batch, by `PackedLayout.of`.

    text, image, documents: tokens of each segment, apart and together. cu_seqlens: where each document starts, and the
    end of the last, (S + 1,) int32. max_seqlen: tokens of the longest, a plain number. order: of each document token,
    its place in `cat([text, image])`. text_places, image_places: of each text and image token, its place in the
    documents.
    """

    text: Segments
    image: Segments
    documents: Segments
    cu_seqlens: Tensor
    max_seqlen: int
    order: Tensor
    text_places: Tensor
    image_places: Tensor

    @classmethod
    def of(cls, text_lengths: Sequence[int], image_lengths: Sequence[int], device: torch.device) -> PackedLayout:
        """Returns the layout of segments with these numbers of tokens.

        Raises ValueError where they are not as many, where a segment has no token, and where there is no segment.
        """
        lengths = [text + image for text, image in zip(text_lengths, image_lengths, strict=False)]
        if not lengths or len(text_lengths) != len(image_lengths) or min(lengths) < 1:
            raise ValueError(
                f"PackedLayout: every segment must have text and image lengths, with a token at least, got text "
                f"{tuple(text_lengths)} and image {tuple(image_lengths)}; give one number of both for each segment"
            )
        ends = [0, *accumulate(lengths)]
        texts = _ranges(ends, text_lengths)
        images = _ranges([start + text for start, text in zip(ends, text_lengths, strict=False)], image_lengths)
        return cls(
            text=Segments.of(text_lengths, device),
            image=Segments.of(image_lengths, device),
            documents=Segments.of(lengths, device),
            cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device),
            max_seqlen=max(lengths),
            order=torch.cat([texts, images]).argsort().to(device),
            text_places=texts.to(device),
            image_places=images.to(device),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        return self.documents.lengths

    @property
    def is_even(self) -> bool:
        """Whether all segments have as many text tokens and as many image tokens."""
        return self.text.is_even and self.image.is_even

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """Returns the documents `(T, ...)` of text tokens `(T_text, ...)` and image tokens `(T_image, ...)`."""
        if self.is_even:
            parts = [x.unflatten(0, (len(self.lengths), -1)) for x in (text, image)]
            return torch.cat(parts, dim=1).flatten(0, 1)
        return torch.cat([text, image]).index_select(0, self.order)

    def split(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Returns text and image tokens of the documents: views where there is one segment, copies otherwise."""
        if self.is_even:
            whole = documents.unflatten(0, (len(self.lengths), -1))
            text, image = whole.split_with_sizes([self.text.lengths[0], self.image.lengths[0]], dim=1)
            return text.flatten(0, 1), image.flatten(0, 1)
        return documents.index_select(0, self.text_places), documents.index_select(0, self.image_places)

    def image_of(self, documents: Tensor) -> Tensor:
        """Returns the image tokens of the documents."""
        return self.split(documents)[1] if self.is_even else documents.index_select(0, self.image_places)


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    parts = [torch.arange(a, a + length, device="cpu") for a, length in zip(starts, lengths, strict=False)]
    return torch.cat(parts)
