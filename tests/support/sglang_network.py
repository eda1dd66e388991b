"""A stand-in for the distributed parts of SGLang-Diffusion 0.5.23's own FLUX.1: process groups and the network.

The network is diffusers', with the inputs of the engine's network: tables of positions, levels times 1000, some tokens.
"""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor, distributed, nn

SERVER = SimpleNamespace(args=SimpleNamespace(enable_cfg_parallel=False), group=None)
"""Global state of the engine: the server's arguments, and the process group (None for that of all ranks)."""


class GroupCoordinator:
    """A group of processes that divide some work: all of this process's group, or only this process."""

    def __init__(self, *, is_alone: bool = False) -> None:
        together = distributed.is_initialized() and not is_alone
        self.world_size = distributed.get_world_size() if together else 1
        self.rank_in_group = distributed.get_rank() if together else 0
        self.device_group = (SERVER.group or distributed.group.WORLD) if together else None

    def all_gather(self, input_: Tensor, dim: int = 0, separate_tensors: bool = False) -> Any:
        if self.world_size == 1:
            return [input_] if separate_tensors else input_
        found = [torch.empty_like(input_, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        distributed.all_gather(found, input_.contiguous(), group=self.device_group)
        return found if separate_tensors else torch.cat(found, dim=dim)

    def all_reduce(self, input_: Tensor, op: Any = distributed.ReduceOp.SUM, async_op: bool = False) -> Tensor:
        distributed.all_reduce(input_, op, group=self.device_group)
        return input_

    def broadcast(self, input_: Tensor, src: int = 0, async_op: bool = False) -> Tensor:
        distributed.broadcast(input_, src, group=self.device_group)
        return input_


def model_parallel_is_initialized() -> bool:
    return distributed.is_initialized()


def get_replica_group() -> GroupCoordinator:
    return GroupCoordinator()


def sequence_group() -> GroupCoordinator:
    """Returns the group that divides the tokens; only this process if guidance branches are divided instead."""
    return GroupCoordinator(is_alone=SERVER.args.enable_cfg_parallel)


def branch_group() -> GroupCoordinator:
    """Returns the group that divides the guidance branches."""
    return GroupCoordinator(is_alone=not SERVER.args.enable_cfg_parallel)


def get_sp_parallel_rank() -> int:
    return sequence_group().rank_in_group


class AttentionBackendEnum(enum.Enum):
    TORCH_SDPA = enum.auto()
    SPARGE_ATTN = enum.auto()

    def __str__(self) -> str:
        return self.name.lower()

    @property
    def is_sparse(self) -> bool:
        return self is AttentionBackendEnum.SPARGE_ATTN


class FluxPosEmbed(nn.Module):
    """Cosines and sines of position ids (S, 3), each (S, C), with one number for each pair of channels."""

    def __init__(self, theta: int, axes_dim: list[int]) -> None:
        super().__init__()
        self.theta, self.axes_dim = theta, axes_dim

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = [
            ids[:, axis, None].double() * self.theta ** -(torch.arange(0, size, 2).double() / size)
            for axis, size in enumerate(self.axes_dim)
        ]
        joined = torch.cat(angles, dim=1)
        return joined.cos().float(), joined.sin().float()


class _GivenPositions(nn.Module):
    """Replaces diffusers' table of positions with the one given by the engine."""

    table: tuple[Tensor, Tensor]

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = (half.repeat_interleave(2, dim=1) for half in self.table)
        return cosine, sine


class FluxTransformer2DModel(nn.Module):
    """The engine's network on this rank's part of the image tokens and, if divisible, of the prompt's tokens."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.rotary_emb = FluxPosEmbed(theta=10000, axes_dim=list(inner.config.axes_dims_rope))
        self.inner = inner
        inner.pos_embed = _GivenPositions()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        pooled_projections: Any = None,
        timestep: Any = None,
        guidance: Any = None,
        freqs_cis: Any = None,
        joint_attention_kwargs: Any = None,
        controlnet_block_samples: Any = None,
        controlnet_single_block_samples: Any = None,
    ) -> Tensor:
        group, text = sequence_group(), encoder_hidden_states.shape[1]
        divides = group.world_size > 1 and text % group.world_size == 0
        if divides:
            own = slice(*(text // group.world_size * (group.rank_in_group + end) for end in (0, 1)))
            encoder_hidden_states = encoder_hidden_states[:, own]
            freqs_cis = tuple(torch.cat([half[:text][own], half[text:]]) for half in freqs_cis)
        self.inner.pos_embed.table = freqs_cis
        alone = 0 if divides else text  # tokens that all ranks have
        attention = transformer_flux.dispatch_attention_fn

        def gathered(query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Any:
            both = [torch.cat([x[:, :alone], group.all_gather(x[:, alone:], dim=1)], dim=1) for x in (key, value)]
            return attention(query, *both, **others)

        with mock.patch.object(transformer_flux, "dispatch_attention_fn", gathered):
            made: Tensor = self.inner(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                timestep=timestep / 1000,
                guidance=guidance / 1000,
                img_ids=torch.zeros(hidden_states.shape[1], 3),
                txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3),
                return_dict=False,
            )[0]
        return made
