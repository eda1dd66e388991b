"""Qwen-Image of diffusers, Edit and Layered: latents are packed tokens, references stand after them.

Attention is joint over text and image, with one rotary table for all images of a batch: images whose anchors differ are
run one by one. The pipelines rescale guided velocities token by token, which makes NaN of tokens that are no anchors;
nobody reads those. Layered makes pictures of one size, the first of them all layers together: a grid (layers, h, w),
with the picture that is taken apart as a reference. Nothing is lifted from one layer to another.
"""

from __future__ import annotations

from typing import Any

from ..cutting import Adapter, part, put, rows
from ..layout import TokenLayout
from .model import Arguments, Config, Model


def _grid(config: Config, arguments: Arguments) -> tuple[int, ...]:
    """Returns (h, w) of the generated picture, whose shape (1, h, w) comes first among an image's; or of layers."""
    if config.get("use_layer3d_rope"):
        return _layers(arguments["img_shapes"])
    shapes = [each[0] if isinstance(each, list) else each for each in arguments["img_shapes"]]
    if any(tuple(shape) != tuple(shapes[0]) for shape in shapes) or shapes[0][0] != 1:
        raise ValueError(
            f"jitaccel: img_shapes must be (1, height, width) of one size for all images of a batch, got {shapes}; "
            f"call image by image"
        )
    return tuple(shapes[0])[1:]


def _layers(img_shapes: Any) -> tuple[int, ...]:
    """Returns (layers, h, w) of what is generated: all of an image's shapes but the last, which is the reference's."""
    first = img_shapes[0]
    if not isinstance(first, list) or any(each != first for each in img_shapes) or len({*first[:-1]}) != 1:
        raise ValueError(
            f"jitaccel: img_shapes must be layers (1, height, width) of one size and the picture that is taken apart, "
            f"the same for all images of a batch, got {img_shapes}; call image by image"
        )
    return (len(first) - 1, *first[0][1:])


def _resized(arguments: Arguments, grid: tuple[int, ...]) -> Arguments:
    """Returns the shapes with other ones in the place of the generated picture's, or of its layers'."""
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
