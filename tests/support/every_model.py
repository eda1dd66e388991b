"""Every cut model, tiny and random, with one call of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.support.ltx_models import crop_tokens, ltx2_call, ltx2_transformer, ltx23_call, ltx_call, ltx_transformer
from tests.support.models import TEXT as TEXT
from tests.support.models import VIDEO as VIDEO
from tests.support.models import noise, randomised
from tests.support.models import text_mask as _text_mask
from tests.support.more_models import (
    bria_call,
    bria_transformer,
    crop_bria,
    crop_fibo,
    fibo_call,
    fibo_transformer,
    hidream_call,
    hidream_transformer,
    hunyuan_image_call,
    hunyuan_image_transformer,
    lumina2_call,
    lumina2_transformer,
    mochi_call,
    mochi_transformer,
)


@dataclass(frozen=True)
class Case:
    """One way to call a model.

    Attributes:
        make: Makes the model.
        call: Makes the arguments for a batch of images with a grid.
        small: The grid of the sub-rectangle that is compared with the model on cropped latents; None if positions
            depend on the size.
        crop: Makes the arguments of the sub-rectangle, which starts at the first token or lies in the middle
            (is_centred).
        is_one_graph: Whether the whole forward compiles.
        num_given: Number of given tokens, which come first and have to be anchors.
    """

    make: Callable[[], Any]
    grid: tuple[int, ...]
    call: Callable[[tuple[int, ...], int], dict[str, Any]]
    small: tuple[int, ...] | None
    crop: Callable[[dict[str, Any], tuple[int, ...], tuple[int, ...]], dict[str, Any]]
    is_one_graph: bool = True
    is_centred: bool = False
    num_given: int = 0


def wan_transformer(seed: int = 0, **overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    return randomised(diffusers.WanTransformer3DModel(**{**settings, **overrides}), seed)


def _wan_call(grid: tuple[int, ...], batch: int, channels: int = 4) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": noise(1, batch, channels, frames, 2 * height, 2 * width),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "timestep": torch.full((batch,), 700.0),
    }


def _wan_per_token(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    timestep = torch.full((batch, *grid), 700.0)
    timestep[:, 0] = 0.0
    return {**_wan_call(grid, batch), "timestep": timestep.flatten(1)}


def _wan_image(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    # The model treats the last 512 text tokens as text, and those before as the image's.
    given = {"encoder_hidden_states": noise(2, batch, 512, 16), "encoder_hidden_states_image": noise(3, batch, 5, 8)}
    return {**_wan_call(grid, batch, channels=9), **given}


def vace_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
        "vace_layers": [0, 2], "vace_in_channels": 6,
    }  # fmt: skip
    return randomised(diffusers.WanVACETransformer3DModel(**{**settings, **overrides}))


def _vace_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {**_wan_call(grid, batch), "control_hidden_states": noise(4, batch, 6, frames, 2 * height, 2 * width)}


def _crop_vace(call: dict[str, Any], grid: tuple[int, ...], small: tuple[int, ...]) -> dict[str, Any]:
    frames, height, width = small
    control = call["control_hidden_states"][:, :, :frames, : 2 * height, : 2 * width]
    return {**_crop_video(call, grid, small), "control_hidden_states": control}


def _crop_video(call: dict[str, Any], grid: tuple[int, ...], small: tuple[int, ...]) -> dict[str, Any]:
    frames, height, width = small
    cropped = {**call, "hidden_states": call["hidden_states"][:, :, :frames, : 2 * height, : 2 * width]}
    if call["timestep"].ndim > 1:
        cropped["timestep"] = call["timestep"].unflatten(1, grid)[:, :frames, :height, :width].flatten(1)
    return cropped


def qwen_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 12,
        "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4),
    }  # fmt: skip
    return randomised(diffusers.QwenImageTransformer2DModel(**{**settings, **overrides}))


def _qwen_call(grid: tuple[int, ...], batch: int, references: int = 0) -> dict[str, Any]:
    height, width = grid
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[-1, -2:] = False
    shapes = [(1, height, width), *([(1, 2, references // 2)] if references else [])]
    return {
        "hidden_states": noise(1, batch, height * width + references, 16),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.7),
        "img_shapes": [shapes] * batch,
    }


def _qwen_layers_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    layers, height, width = grid
    shapes = [*[(1, height, width)] * layers, (1, 2, 3)]
    return {
        **_qwen_call((layers * height, width), batch, references=6),
        "img_shapes": [shapes] * batch,
        "additional_t_cond": torch.zeros(batch, dtype=torch.long),
    }


def _no_crop(call: dict[str, Any], grid: tuple[int, ...], small: tuple[int, ...]) -> dict[str, Any]:
    raise AssertionError("there is no sub-rectangle to compare with")


def hunyuan_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 2, "patch_size_t": 1,
        "guidance_embeds": True, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
    }  # fmt: skip
    return randomised(diffusers.HunyuanVideoTransformer3DModel(**{**settings, **overrides}))


def _hunyuan_call(grid: tuple[int, ...], batch: int, channels: int = 4) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": noise(1, batch, channels, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 700.0),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "encoder_attention_mask": _text_mask(batch, TEXT),
        "pooled_projections": noise(3, batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def hunyuan15_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
        "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16,
        "text_embed_2_dim": 8, "image_embed_dim": 12, "rope_axes_dim": (2, 2, 4), "target_size": 16,
        "task_type": "t2v",
    }  # fmt: skip
    return randomised(diffusers.HunyuanVideo15Transformer3DModel(**{**settings, **overrides}))


def _hunyuan15_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, batch, 9, *grid),
        "timestep": torch.full((batch,), 700.0),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "encoder_attention_mask": _text_mask(batch, TEXT),
        "encoder_hidden_states_2": noise(3, batch, 4, 8),
        "encoder_attention_mask_2": _text_mask(batch, 4),
        "image_embeds": torch.zeros(batch, 3, 12),
    }


def _crop_plain(call: dict[str, Any], grid: tuple[int, ...], small: tuple[int, ...]) -> dict[str, Any]:
    return {**call, "hidden_states": call["hidden_states"][(..., *(slice(side) for side in small))]}


def sd3_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 16,
        "pooled_projection_dim": 8, "pos_embed_max_size": 24, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    return randomised(diffusers.SD3Transformer2DModel(**{**settings, **overrides}))


def _sd3_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, batch, 4, 2 * grid[0], 2 * grid[1]),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "pooled_projections": noise(3, batch, 8),
        "timestep": torch.full((batch,), 700.0),
    }


def _crop_centre(call: dict[str, Any], grid: tuple[int, ...], small: tuple[int, ...]) -> dict[str, Any]:
    starts = [2 * ((side - inner) // 2) for side, inner in zip(grid, small, strict=True)]
    region = [slice(start, start + 2 * inner) for start, inner in zip(starts, small, strict=True)]
    return {**call, "hidden_states": call["hidden_states"][(..., *region)]}


def auraflow_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1,
        "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16,
        "joint_attention_dim": 16, "pos_embed_max_size": 576,
    }  # fmt: skip
    return randomised(diffusers.AuraFlowTransformer2DModel(**{**settings, **overrides}))


def _auraflow_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    call = {name: value for name, value in _sd3_call(grid, batch).items() if name != "pooled_projections"}
    return {**call, "timestep": torch.full((batch,), 0.7)}


def z_image_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 16, "n_layers": 2,
        "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 2, 2],
        "axes_lens": [256, 32, 32],
    }  # fmt: skip
    return randomised(diffusers.ZImageTransformer2DModel(**{**settings, **overrides}))


def _z_image_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, batch, 4, 2 * grid[0], 2 * grid[1]),
        "timestep": torch.full((batch,), 0.3),
        "cap_feats": [noise(2 + image, TEXT + image, 16) for image in range(batch)],
    }


def _crop_corner(call: dict[str, Any], grid: tuple[int, ...], small: tuple[int, ...]) -> dict[str, Any]:
    return {**call, "hidden_states": call["hidden_states"][:, :, : 2 * small[0], : 2 * small[1]]}


CASES: dict[str, Case] = {
    "BriaFiboTransformer2DModel": Case(fibo_transformer, (10, 14), fibo_call, (6, 8), crop_fibo),
    "HiDreamImageTransformer2DModel, not square": Case(
        hidream_transformer, (10, 14), hidream_call, None, _no_crop, is_one_graph=False
    ),
    "HiDreamImageTransformer2DModel": Case(
        hidream_transformer, (10, 10), hidream_call, (6, 6), _crop_corner, is_one_graph=False
    ),
    "BriaTransformer2DModel": Case(bria_transformer, (10, 14), bria_call, (6, 8), crop_bria),
    # Positions within a frame depend on its size, so the sub-rectangle has fewer frames.
    "MochiTransformer3DModel": Case(mochi_transformer, VIDEO, mochi_call, (2, 6, 8), _crop_video),
    "Lumina2Transformer2DModel": Case(
        lumina2_transformer, (10, 14), lumina2_call, (6, 8), _crop_corner, is_one_graph=False
    ),
    "AuraFlowTransformer2DModel": Case(
        auraflow_transformer, (10, 14), _auraflow_call, (6, 8), _crop_centre, is_centred=True
    ),
    "ZImageTransformer2DModel": Case(
        z_image_transformer, (8, 12), _z_image_call, (4, 8), _crop_corner, is_one_graph=False
    ),
    "HunyuanImageTransformer2DModel": Case(
        hunyuan_image_transformer, (10, 14), hunyuan_image_call, (6, 8), _crop_plain, is_one_graph=False
    ),
    "LTXVideoTransformer3DModel": Case(ltx_transformer, VIDEO, ltx_call, (2, 3, 4), crop_tokens),
    "LTX2VideoTransformer3DModel": Case(ltx2_transformer, VIDEO, ltx2_call, (2, 3, 4), crop_tokens),
    "LTX2VideoTransformer3DModel, tables for each head and a level of its own for prompts": Case(
        lambda: ltx2_transformer(
            rope_type="split", cross_attn_mod=True, audio_cross_attn_mod=True, use_prompt_embeddings=False
        ),
        VIDEO,
        ltx23_call,
        (2, 3, 4),
        crop_tokens,
    ),
    "WanVACETransformer3DModel": Case(vace_transformer, VIDEO, _vace_call, (2, 3, 4), _crop_vace),
    "SD3Transformer2DModel": Case(sd3_transformer, (10, 14), _sd3_call, (6, 8), _crop_centre, is_centred=True),
    "HunyuanVideoTransformer3DModel": Case(hunyuan_transformer, VIDEO, _hunyuan_call, (2, 3, 4), _crop_video),
    "HunyuanVideoTransformer3DModel, an image in further channels": Case(
        lambda: hunyuan_transformer(in_channels=9, image_condition_type="latent_concat"),
        VIDEO,
        functools.partial(_hunyuan_call, channels=9),
        (2, 3, 4),
        _crop_video,
    ),
    "HunyuanVideoTransformer3DModel, the first frame replaced": Case(
        lambda: hunyuan_transformer(image_condition_type="token_replace"),
        VIDEO,
        _hunyuan_call,
        (2, 6, 8),
        _crop_video,
        num_given=48,
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        hunyuan15_transformer, VIDEO, _hunyuan15_call, (2, 3, 4), _crop_plain, is_one_graph=False
    ),
    "HunyuanVideo15Transformer3DModel, an image": Case(
        hunyuan15_transformer,
        VIDEO,
        lambda grid, batch: {**_hunyuan15_call(grid, batch), "image_embeds": noise(4, batch, 3, 12)},
        (2, 3, 4),
        _crop_plain,
        is_one_graph=False,
    ),
    "QwenImageTransformer2DModel": Case(qwen_transformer, (10, 14), _qwen_call, None, _no_crop),
    "QwenImageTransformer2DModel, references and a second modulation": Case(
        lambda: qwen_transformer(zero_cond_t=True),
        (10, 14),
        functools.partial(_qwen_call, references=6),
        None,
        _no_crop,
    ),
    "QwenImageTransformer2DModel, layers": Case(
        lambda: qwen_transformer(use_layer3d_rope=True, use_additional_t_cond=True),
        VIDEO,
        _qwen_layers_call,
        None,
        _no_crop,
    ),
    "WanTransformer3DModel": Case(wan_transformer, VIDEO, _wan_call, (2, 3, 4), _crop_video),
    "WanTransformer3DModel, a timestep for every token": Case(
        wan_transformer, VIDEO, _wan_per_token, (2, 3, 4), _crop_video
    ),
    "WanTransformer3DModel, image to video": Case(
        lambda: wan_transformer(in_channels=9, added_kv_proj_dim=24, image_dim=8),
        VIDEO,
        _wan_image,
        (2, 3, 4),
        _crop_video,
    ),
}


def region(case: Case) -> Tensor:
    """Returns the raster indices (M,) of a case's sub-rectangle."""
    assert case.small is not None
    index = torch.arange(torch.Size(case.grid).numel()).view(case.grid)
    starts = [(n - k) // 2 if case.is_centred else 0 for n, k in zip(case.grid, case.small, strict=True)]
    return index[tuple(slice(at, at + k) for at, k in zip(starts, case.small, strict=True))].flatten()


def row_of(call: dict[str, Any], image: int) -> dict[str, Any]:
    """Returns the call of one image from a batch. In the outputs of Llama's layers, images are the second axis."""

    def own(name: str, value: Any) -> Any:
        if not isinstance(value, (Tensor, list)) or name.endswith("_ids"):
            return value
        if name.endswith("layers"):
            return [each[image : image + 1] for each in value]
        return value[:, image : image + 1] if name.endswith("llama3") else value[image : image + 1]

    return {name: own(name, value) for name, value in call.items()}
