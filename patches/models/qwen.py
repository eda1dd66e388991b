"""Qwen-Image of diffusers, and Edit: latents are packed tokens, references stand after them.

Attention is joint over text and image, with one rotary table for all images of a batch: images whose anchors differ are
run one by one. The pipelines rescale guided velocities token by token, which makes NaN of tokens that are no anchors;
nobody reads those.
"""

from __future__ import annotations

from ..cutting import Adapter, part, put, rows
from ..layout import TokenLayout
from .model import Arguments, Config, Model


def _grid(config: Config, arguments: Arguments) -> tuple[int, ...]:
    """Returns (h, w) of the generated picture, whose shape (1, h, w) comes first among an image's."""
    shapes = [each[0] if isinstance(each, list) else each for each in arguments["img_shapes"]]
    if any(tuple(shape) != tuple(shapes[0]) for shape in shapes) or shapes[0][0] != 1:
        raise ValueError(
            f"jitaccel: img_shapes must be (1, height, width) of one size for all images of a batch, got {shapes}; "
            f"call image by image"
        )
    return tuple(shapes[0])[1:]


def _resized(arguments: Arguments, grid: tuple[int, ...]) -> Arguments:
    """Returns the shapes with another one in the place of the generated picture's."""
    first = (1, *grid)
    shapes = [[first, *each[1:]] if isinstance(each, list) else first for each in arguments["img_shapes"]]
    return {"img_shapes": shapes}


def _problem(config: Config) -> str | None:
    return "transformer must not have layers (use_layer3d_rope), got some" if config.get("use_layer3d_rope") else None


QWEN = Model(
    name="QwenImageTransformer2DModel",
    pipelines=("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
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
    resized=_resized,
    schedule="beta",
    divides=True,
    divides_text=True,
    refused={"controlnet_block_samples": "ControlNet residuals"},
    problem=_problem,
)
MODELS = (QWEN,)
