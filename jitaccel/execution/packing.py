"""Packed sequences: several sequences of different length as one, and the place of each token in it.

A segment is the tokens of one image's forward: its text tokens and its image tokens. Where weights differ between text
and image, a model keeps the two apart, each with all segments in order (`text`, `image`). For attention it needs them
together: one document `[text_k, image_k]` per segment, in order.

Everything is computed when a layout is made, so that a compiler sees only tensors and plain numbers.
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

    Attributes:
        lengths: Number of tokens of each segment.
        is_even: Whether all segments have the same length.
        segment_of: (T,) int64, the segment of each token.
    """

    lengths: tuple[int, ...]
    is_even: bool
    segment_of: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        segments = torch.repeat_interleave(torch.tensor([*lengths], dtype=torch.int64, device="cpu"))
        return cls(tuple(lengths), len(set(lengths)) == 1, segments.to(device))

    def beside(self, x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Returns tokens `x` (T, D) and per-segment `values` (S, D) in shapes that broadcast for pointwise operations.

        `flat` turns a result back into (T, D). Nothing is copied if the segments have the same length.
        """
        if self.is_even:
            return (x.unflatten(0, (len(self.lengths), -1)), *(value.unsqueeze(1) for value in values))
        return (x, *(value.index_select(0, self.segment_of) for value in values))

    def flat(self, x: Tensor) -> Tensor:
        """Returns a result computed from the output of `beside` as `(T, D)`."""
        return x.flatten(0, 1) if self.is_even else x


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The places of the tokens of several segments; made once per stage and batch by `PackedLayout.of`.

    Attributes:
        text: Text tokens of each segment.
        image: Image tokens of each segment.
        documents: All tokens of each segment.
        cu_seqlens: (S + 1,) int32, the start of each document, and the end of the last.
        max_seqlen: Length of the longest document, a plain number.
        order: For each document token, its place in `cat([text, image])`.
        text_places: For each text token, its place in the documents.
        image_places: For each image token, its place in the documents.
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

        Raises ValueError if the two lists differ in length, if a segment has no token, or if there is no segment.
        """
        lengths = [text + image for text, image in zip(text_lengths, image_lengths, strict=False)]
        if not lengths or len(text_lengths) != len(image_lengths) or min(lengths) < 1:
            raise ValueError(
                f"PackedLayout: every segment must have text and image lengths of at least one token, got text "
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
        """Number of tokens of each document."""
        return self.documents.lengths

    @property
    def is_even(self) -> bool:
        """Whether all segments have the same numbers of text and image tokens."""
        return self.text.is_even and self.image.is_even

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """Returns the documents `(T, ...)` of text tokens `(T_text, ...)` and image tokens `(T_image, ...)`."""
        if self.is_even:
            parts = [x.unflatten(0, (len(self.lengths), -1)) for x in (text, image)]
            return torch.cat(parts, dim=1).flatten(0, 1)
        return torch.cat([text, image]).index_select(0, self.order)

    def split(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Returns text and image tokens of the documents: views if there is one segment, copies otherwise."""
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
