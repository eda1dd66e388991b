"""Our own version of Black Forest Labs' `Flux`, with their weight names, call and conventions, but none of their code.

It has exactly the modules that their checkpoints need in order to load strictly. Norms without weights are functions
here and modules there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TIME_CHANNELS = 256


@dataclass(frozen=True, kw_only=True)
class Params:
    """The fields of their parameters from which jitaccel computes costs."""

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    theta: int
    qkv_bias: bool
    guidance_embed: bool


def sinusoids(values: Tensor) -> Tensor:
    """Returns cosines, then sines, (B, 256), of levels or guidance scales (B,), which are multiplied by 1000 first."""
    half = _TIME_CHANNELS // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / half))
    angles = 1000.0 * values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotations(ids: Tensor, axes: tuple[int, ...], theta: int) -> Tensor:
    """Returns e^(i angle) (B, 1, S, head channels / 2) of position ids (B, S, A), with channel pairs for each axis."""
    angles = []
    for axis, channels in enumerate(axes):
        frequencies = theta ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angles.append(ids[..., axis, None].double() * frequencies)
    angle = torch.cat(angles, dim=-1)[:, None]
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Returns (B, H, S, C) with each pair of neighbouring channels rotated by its angle."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def attend(parts: tuple[Tensor, Tensor, Tensor], rotation: Tensor) -> Tensor:
    """Returns the result of attention (B, S, H * C), with the heads concatenated."""
    query, key, value = parts
    answer = F.scaled_dot_product_attention(rotate(query, rotation), rotate(key, rotation), value)
    return answer.transpose(1, 2).flatten(2)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns the normalised tokens (B, S, width), scaled and shifted by (B, 1, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Embedder(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(channels, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """Shift, scale and gate for each branch of a block."""

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.branches = branches
        self.lin = nn.Linear(width, 3 * branches * width)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(condition))[:, None].chunk(3 * self.branches, dim=-1)


class RootMeanSquare(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale, eps=1e-6)


class HeadNorms(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_norm = RootMeanSquare(channels)
        self.key_norm = RootMeanSquare(channels)

    def split(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns query, key and value (B, H, S, C) of (B, S, 3 H C), the first two normalised."""
        query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return self.query_norm(query), self.key_norm(key), value


class Attention(nn.Module):
    def __init__(self, params: Params) -> None:
        super().__init__()
        width = params.hidden_size
        self.heads = params.num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=params.qkv_bias)
        self.norm = HeadNorms(width // params.num_heads)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm.split(self.qkv(x), self.heads)


class DoubleBlock(nn.Module):
    def __init__(self, params: Params) -> None:
        super().__init__()
        width, inner = params.hidden_size, int(params.mlp_ratio * params.hidden_size)
        for stream in ("img", "txt"):
            mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))
            self.add_module(f"{stream}_mod", Modulation(width, 2))
            self.add_module(f"{stream}_attn", Attention(params))
            self.add_module(f"{stream}_mlp", mlp)

    def forward(self, txt: Tensor, img: Tensor, condition: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        txt_mod, img_mod = self.txt_mod(condition), self.img_mod(condition)
        of_txt = self.txt_attn.split(modulated(txt, *txt_mod[:2]))
        of_img = self.img_attn.split(modulated(img, *img_mod[:2]))
        query, key, value = (torch.cat(both, dim=2) for both in zip(of_txt, of_img, strict=True))  # text comes first
        answer = attend((query, key, value), rotation)
        txt = txt + txt_mod[2] * self.txt_attn.proj(answer[:, : txt.shape[1]])
        img = img + img_mod[2] * self.img_attn.proj(answer[:, txt.shape[1] :])
        txt = txt + txt_mod[5] * self.txt_mlp(modulated(txt, *txt_mod[3:5]))
        img = img + img_mod[5] * self.img_mlp(modulated(img, *img_mod[3:5]))
        return txt, img


class SingleBlock(nn.Module):
    def __init__(self, params: Params) -> None:
        super().__init__()
        width, inner = params.hidden_size, int(params.mlp_ratio * params.hidden_size)
        self.heads, self.sizes = params.num_heads, (3 * width, inner)
        self.modulation = Modulation(width, 1)
        self.linear1 = nn.Linear(width, 3 * width + inner)
        self.norm = HeadNorms(width // params.num_heads)
        self.linear2 = nn.Linear(width + inner, width)

    def forward(self, x: Tensor, condition: Tensor, rotation: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition)
        qkv, inner = self.linear1(modulated(x, shift, scale)).split(self.sizes, dim=-1)
        answer = attend(self.norm.split(qkv, self.heads), rotation)
        return x + gate * self.linear2(torch.cat([answer, F.gelu(inner, approximate="tanh")], dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, params: Params) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(params.hidden_size, 2 * params.hidden_size))
        self.linear = nn.Linear(params.hidden_size, params.out_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(x, shift, scale))


class Flux(nn.Module):
    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params, self.out_channels = params, params.out_channels
        width = params.hidden_size
        self.img_in = nn.Linear(params.in_channels, width)
        self.txt_in = nn.Linear(params.context_in_dim, width)
        self.time_in = Embedder(_TIME_CHANNELS, width)
        self.vector_in = Embedder(params.vec_in_dim, width)
        self.guidance_in = Embedder(_TIME_CHANNELS, width) if params.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleBlock(params) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(params) for _ in range(params.depth_single_blocks))
        self.final_layer = FinalLayer(params)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        condition = self.time_in(sinusoids(timesteps))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("Flux: guidance must be given to a distilled model, got None")
            condition = condition + self.guidance_in(sinusoids(guidance))
        condition = condition + self.vector_in(y)
        rotation = rotations(torch.cat([txt_ids, img_ids], dim=1), self.params.axes_dim, self.params.theta)
        text, image = self.txt_in(txt), self.img_in(img)
        for block in self.double_blocks:
            text, image = block(text, image, condition, rotation)
        tokens = torch.cat([text, image], dim=1)
        for block in self.single_blocks:
            tokens = block(tokens, condition, rotation)
        return self.final_layer(tokens[:, txt.shape[1] :], condition)


# Their modules, with the diffusers modules whose rows each stacks: outside the blocks, and in a block of each kind.
ENDS = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.norm.query_norm": ["attn.norm_q"],
    "img_attn.norm.key_norm": ["attn.norm_k"],
    "img_attn.proj": ["attn.to_out.0"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mod.lin": ["norm1_context.linear"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
    "txt_attn.proj": ["attn.to_add_out"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
SINGLE = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "norm.query_norm": ["attn.norm_q"],
    "norm.key_norm": ["attn.norm_k"],
    "linear2": ["proj_out"],
}


def to_bfl(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of a FluxTransformer2DModel, named and stacked as in a `Flux`; all must be used."""
    depth, depth_single = (
        len({key.split(".")[1] for key in weights if key.startswith(kind)})
        for kind in ("transformer_blocks.", "single_transformer_blocks.")
    )
    tables = [("", "", ENDS)]
    tables += [(f"double_blocks.{i}.", f"transformer_blocks.{i}.", DOUBLE) for i in range(depth)]
    tables += [(f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", SINGLE) for i in range(depth_single)]
    left, made = dict(weights), {}
    for prefix, source, table in tables:
        for name, parts in table.items():
            for kind in ("weight", "bias"):
                rows = [left.pop(f"{source}{part}.{kind}", None) for part in parts]
                if rows[0] is None:
                    continue  # norms have no bias, models that are not distilled no embedded guidance
                if name == "final_layer.adaLN_modulation.1":
                    rows = [*reversed(rows[0].chunk(2))]  # scale and shift here, shift and scale there
                made[f"{prefix}{name}.{'scale' if name.endswith('_norm') else kind}"] = torch.cat(rows)
    assert not left
    return made


def flux_of(model: Any) -> Flux:
    """Returns the `Flux` with the same weights."""
    config = model.config
    params = Params(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        vec_in_dim=config.pooled_projection_dim,
        context_in_dim=config.joint_attention_dim,
        hidden_size=config.num_attention_heads * config.attention_head_dim,
        mlp_ratio=4.0,
        num_heads=config.num_attention_heads,
        depth=config.num_layers,
        depth_single_blocks=config.num_single_layers,
        axes_dim=config.axes_dims_rope,
        theta=10_000,
        qkv_bias=True,
        guidance_embed=config.guidance_embeds,
    )
    flux = Flux(params).eval()
    flux.load_state_dict(to_bfl(model.state_dict()), strict=True)
    return flux
