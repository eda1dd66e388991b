"""Converting latents of any rank to tokens and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from jitaccel.patches.layout import PatchLayout, patchify, unpatchify
from tests.support.models import noise

SHAPES = [((4, 6), (2, 2)), ((3, 4, 6), (1, 2, 2)), ((4, 4, 6), (2, 1, 3)), ((2, 3, 4), (1, 1, 1))]


def by_hand(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Returns the tokens of one image, each cut out of it in raster order."""
    grid = [size // side for size, side in zip(x.shape[1:], patch, strict=True)]
    tokens = []
    for place in itertools.product(*map(range, grid)):
        region = [slice(at * side, (at + 1) * side) for at, side in zip(place, patch, strict=True)]
        tokens.append(x[(slice(None), *region)].flatten())
    return torch.stack(tokens)


@pytest.mark.parametrize(("sizes", "patch"), SHAPES)
def test_token_is_its_patch_and_comes_back(sizes: tuple[int, ...], patch: tuple[int, ...]) -> None:
    x = noise(0, 2, 5, *sizes)
    tokens = patchify(x, patch)
    assert torch.equal(tokens, torch.stack([by_hand(image, patch) for image in x]))
    grid = PatchLayout(patch).grid(x.shape)
    assert torch.equal(unpatchify(tokens, grid, patch), x)


@pytest.mark.parametrize("sizes", [(5, 6), (3, 4, 6), (4,)])
def test_latents_that_are_no_whole_patches_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latents must be .* of whole patches of \(2, 2\), got shape \(1, 3, "):
        PatchLayout((2, 2)).grid((1, 3, *sizes))


def test_further_channels_stay_with_what_is_generated() -> None:
    layout, given = PatchLayout((1, 2, 2)), noise(1, 2, 9, 2, 4, 4)
    generated = layout.generated(given, num_tokens=8, channels=4)
    assert torch.equal(generated, given[:, :4])
    assert torch.equal(layout.put_generated(generated, given), given)
    other = layout.to_latents(2 * layout.to_tokens(generated), like=given)
    assert torch.equal(layout.put_generated(other, given), torch.cat([2 * given[:, :4], given[:, 4:]], dim=1))
    assert layout.generated(given, num_tokens=8, channels=9) is given
