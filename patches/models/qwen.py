"""Qwen-Image, Edit and Layered of diffusers. Latents are packed tokens, followed by reference tokens.

Attention is joint over text and image. One rotary table serves all images of a batch, so images with different anchors
run one by one. The pipelines rescale guided velocities token by token, which yields NaN at tokens that are not anchors;
nobody reads those. Layered makes pictures of one size, of which the first shows all layers together: a grid
(layers, h, w), with the picture to be decomposed as a reference. Nothing is lifted from one layer to another.
"""

from __future__ import annotations

from typing import Any

from ..cutting import Adapter, part, put, rows
from ..layout import TokenLayout
from .model import Arguments, Config, Model


def _grid(config: Config, arguments: Arguments) -> tuple[int, ...]:
    """Returns (h, w) of the generated picture, the first of an image's shapes (1, h, w), or the grid of layers."""
    if config.get("use_layer3d_rope"):
        return _layers(arguments["img_shapes"])
    shapes = [each[0] if isinstance(each, list) else each for each in arguments["img_shapes"]]
    if any(tuple(shape) != tuple(shapes[0]) for shape in shapes) or shapes[0][0] != 1:
        raise ValueError(
            f"jitaccel: img_shapes must have the same (1, height, width) for all images of a batch, got {shapes}; "
            f"call image by image"
        )
    return tuple(shapes[0])[1:]


def _layers(img_shapes: Any) -> tuple[int, ...]:
    """Returns the generated grid (layers, h, w), from all of an image's shapes except the last, the reference's."""
    first = img_shapes[0]
    if not isinstance(first, list) or any(each != first for each in img_shapes) or len({*first[:-1]}) != 1:
        raise ValueError(
            f"jitaccel: img_shapes must be layers (1, height, width) of one size and the picture to be decomposed, the "
            f"same for all images of a batch, got {img_shapes}; call image by image"
        )
    return (len(first) - 1, *first[0][1:])


def _resized(arguments: Arguments, grid: tuple[int, ...]) -> Arguments:
    """Returns the shapes with those of the generated picture, or of its layers, replaced."""
    layers, first = (1 if len(grid) == 2 else grid[0]), (1, *grid[-2:])
    shapes = [[first] * layers + each[layers:] if isinstance(each, list) else first for each in arguments["img_shapes"]]
    return {"img_shapes": shapes}


QWEN = Model(
    name="QwenImageTransformer2DModel",
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
    ),
    adapter=Adapter(
        outputs={"img_in": rows(1), "pos_embed": part(0, rows(0)), "proj_out": put},
        blocks={"transformer_blocks": {"modulate_index": rows(1)}},
        has_one_table=True,
        rows=(
            "hidden_states",
            "encoder_hidden_states",
            "encoder_hidden_states_mask",
            "timestep",
            "img_shapes",
            "txt_seq_lens",
            "guidance",
            "additional_t_cond",
        ),
    ),
    layout=lambda config: TokenLayout(),
    grid=_grid,
    channels=lambda config: int(config["in_channels"]),
    per_level=1.0,
    frames="layers",
    resized=_resized,
    schedule="beta",
    divides=True,
    divides_text=True,
    refused={"controlnet_block_samples": "ControlNet residuals"},
)
MODELS = (QWEN,)
