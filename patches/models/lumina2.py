"""Lumina Image 2.0 of diffusers: picture and prompt in one sequence, and a timestep that rises while noise falls.

The module that makes positions also makes tokens, and returns for each picture where the prompt and the picture end.
The model uses these lists to join prompt and picture, and to read the picture from the result. Each picture has its own
position ids, so pictures can have different anchors in one forward. By default the pipeline scales rows of whole guided
pictures (`cfg_normalization`), so each branch is lifted first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..cutting import Adapter, Places
from ..layout import PatchLayout
from .model import Config, Model, channels_out

_ENDS = "ends of prompts, ends of pictures"


def _layout(config: Config) -> PatchLayout:
    return PatchLayout((config["patch_size"], config["patch_size"]))


def _tokens(made: tuple[Any, ...], places: Places) -> tuple[Any, ...]:
    """Cuts the result of `rope_embedder` to the anchors' tokens and positions, and shortens the pictures' ends."""
    patches, of_prompts, of_pictures, of_both, ends_of_prompts, _ = made
    anchors = places.anchors.expand(len(patches), -1)
    joined = [
        torch.cat([own[:start], own[start + at]])
        for own, start, at in zip(of_both, ends_of_prompts, anchors, strict=True)
    ]
    sooner = [start + anchors.shape[1] for start in ends_of_prompts]
    places.kept[_ENDS] = (ends_of_prompts, sooner)
    patches, of_pictures = places.take(patches, 1), places.take(of_pictures, 1)
    return patches, of_prompts, of_pictures, pad_sequence(joined, batch_first=True), ends_of_prompts, sooner


def _put(x: Tensor, places: Places) -> Tensor:
    """Returns whole pictures without prompts, (B, N, D), and sets the lists of ends accordingly."""
    starts, ends = places.kept.pop(_ENDS)
    pictures = torch.stack([own[start:end] for own, start, end in zip(x, starts, ends, strict=True)])
    starts[:], ends[:] = [0] * len(x), [places.num_tokens] * len(x)
    return places.put(pictures)


def _flops(config: Config, image_tokens: int, text_tokens: int) -> int:
    """Returns the operations of one forward: matrix products of blocks, embedding and last projection.

    This is a formula because the model reads the lengths of prompts, so that it cannot be traced. A multiply-add counts
    as two. Embedding the prompt is left out. Padding of prompts is counted in all blocks, although it only enters
    `context_refiner`.
    """
    width, depth = config["hidden_size"], config["num_layers"]
    refined = config["num_refiner_layers"]
    hidden = int(4 * width * (config["ffn_dim_multiplier"] or 1.0))
    hidden = -(-hidden // config["multiple_of"]) * config["multiple_of"]
    shared = width * config["num_kv_heads"] // config["num_attention_heads"]
    weights = 2 * width**2 + 2 * width * shared + 3 * width * hidden

    def block(tokens: int) -> int:
        return tokens * weights + 2 * tokens**2 * width

    modulation = (depth + refined) * 4 * width * min(width, 1024)
    ends = image_tokens * config["patch_size"] ** 2 * (config["in_channels"] + channels_out(config)) * width
    both = image_tokens + text_tokens
    return 2 * (depth * block(both) + refined * (block(image_tokens) + block(text_tokens)) + modulation + ends)


LUMINA2 = Model(
    name="Lumina2Transformer2DModel",
    pipelines=("Lumina2Pipeline",),
    adapter=Adapter(outputs={"rope_embedder": _tokens, "norm_out": _put}),
    layout=_layout,
    grid=lambda config, arguments: _layout(config).grid(arguments["hidden_states"].shape),
    channels=channels_out,
    per_level=1.0,
    is_inverted=True,
    sign=-1,
    schedule="beta",
    cost=_flops,
    blocks=("noise_refiner", "context_refiner", "layers"),
)
MODELS = (LUMINA2,)
