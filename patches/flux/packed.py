"""diffusers' FLUX.1 transformer on one packed sequence for any number of images, with the model's weights and modules.

The images of a batch may differ in anchors, prompts, sizes and noise levels. Every leaf of the model is called as a
module, so that LoRA layers, quantised weights and offloading of leaves work. Hooks on modules that are not called
(blocks, the model itself) are run explicitly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from jitaccel.execution.attention.backend import Attend
from jitaccel.execution.attention.choice import Backend, varlen_attention
from jitaccel.execution.options import Execution
from jitaccel.execution.packing import PackedLayout, Segments
from jitaccel.method.lift import LiftPlan
from jitaccel.method.pool import PooledPlan

from ..split import beside
from .hooks import block_hooks

if TYPE_CHECKING:
    from jitaccel.execution.compile import Compiler

StageFunction = Callable[
    [nn.Module, "Pack", LiftPlan | PooledPlan, Tensor, "Shown", "Conditions", Tensor | float],
    tuple[Tensor, Tensor | None],
]

_HALF_RANGE = 65504  # FLUX overflows float16; the model's own blocks clip


@dataclass(frozen=True, eq=False)
class Pack:
    """Data that all steps of a stage and batch share.

    Attributes:
        layout: The segments of the packed sequence.
        rotary: Cosines and sines (T, head_dim) of the documents.
        hooked: Whether the hooks of blocks must be run.
    """

    layout: PackedLayout
    rotary: tuple[Tensor, Tensor]
    hooked: bool


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The inputs of one forward of S segments other than image tokens.

    Attributes:
        text: (T_text, E), the text tokens of all segments.
        pooled: (S, P).
        level: (S,).
        guidance: (S,); None for models without a guidance embedding.
    """

    text: Tensor
    pooled: Tensor
    level: Tensor
    guidance: Tensor | None = None


def make_pack(model: Any, text_ids: Sequence[Tensor], image_ids: Sequence[Tensor]) -> Pack:
    """Returns the pack of segments whose text and image position ids are (L_k, 3) and (M_k, 3)."""
    device = image_ids[0].device
    layout = PackedLayout.of([len(ids) for ids in text_ids], [len(ids) for ids in image_ids], device)
    ids = layout.join(torch.cat([*text_ids]), torch.cat([*image_ids]))
    blocks = (*model.transformer_blocks, *model.single_transformer_blocks)
    return Pack(layout, model.pos_embed(ids), hooked=any("forward" in vars(block) for block in blocks))


@dataclass(frozen=True, eq=False)
class Shown:
    """A model's conditions next to the state: extra channels (B, N, E) of its tokens, and references (B, R, C)."""

    extra: Tensor | None = None
    references: Tensor | None = None


class Blocks(NamedTuple):
    """The functions that run a double-stream and a single-stream block."""

    double: Callable[[Any, Tensor, Tensor, Tensor, Pack, Attend], tuple[Tensor, Tensor]]
    single: Callable[[Any, Tensor, Tensor, Pack, Attend], Tensor]


def plain_blocks() -> Blocks:
    """Returns the block functions unchanged."""
    return Blocks(_double, _single)


@functools.cache
def regional_blocks() -> Blocks:
    """Returns block functions that are compiled once and reused for every repetition in a graph."""
    return Blocks(torch.compiler.nested_compile_region(_double), torch.compiler.nested_compile_region(_single))


def packed_forward(
    model: Any, pack: Pack, tokens: Tensor, given: Conditions, attend: Attend, blocks: Blocks | None = None
) -> Tensor:
    """Returns the velocity (T_image, channels) of all image tokens, equal to the model's on each segment by itself.

    Args:
        model: The transformer.
        pack: The layout of the segments.
        tokens: (T_image, channels), segment after segment.
        given: The other inputs of the segments.
        attend: The attention.
        blocks: The block functions; None for the plain ones.
    """
    double, single = blocks or plain_blocks()
    layout = pack.layout
    image = model.x_embedder(tokens)
    numbers = [1000 * given.level.to(image.dtype)]
    if given.guidance is not None:
        numbers.append(1000 * given.guidance.to(image.dtype))
    condition = model.time_text_embed(*numbers, given.pooled)
    text = model.context_embedder(given.text)
    for block in model.transformer_blocks:
        with block_hooks(block) if pack.hooked else nullcontext():
            text, image = double(block, text, image, condition, pack, attend)
    documents = layout.join(text, image)
    for block in model.single_transformer_blocks:
        with block_hooks(block) if pack.hooked else nullcontext():
            documents = single(block, documents, condition, pack, attend)
    out = model.norm_out
    scale, shift = out.linear(out.silu(condition).to(documents.dtype)).chunk(2, dim=1)
    image = _modulate(out.norm(layout.image_of(documents)), shift, scale, layout.image)
    velocity: Tensor = model.proj_out(image)
    return velocity


def compiler_of(options: Execution) -> Compiler | None:
    """Returns the compiler for the forwards of one `apply`; None if they run eagerly."""
    if options.compile is None:
        return None
    from jitaccel.execution.compile import Compiler  # imported late: the compiler takes a second to import

    return Compiler(options.compile, options.strict)


def run_packed(
    model: nn.Module,
    pack: Pack,
    tokens: Tensor,
    given: Conditions,
    attention: Backend,
    blocks: Blocks | None = None,
) -> Tensor:
    """Returns `packed_forward`'s velocity with this attention."""

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
        return varlen_attention(query, key, value, layout, attention)

    return packed_forward(model, pack, tokens, given, attend, blocks)


def run_stage(
    model: nn.Module,
    pack: Pack,
    plan: LiftPlan | PooledPlan,
    state: Tensor,
    shown: Shown,
    given: Conditions,
    attention: Backend,
    lifter: Literal["velocity", "clean"] | None = None,
    noise_level: float = 1.0,
    compiler: Compiler | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the velocity at the anchors, (B, M, D), and the velocity lifted from them, (B, N, D).

    The lifted velocity is None in a dense stage or without a lifter. With a compiler, all of this is one graph for
    these lengths.

    Args:
        model: The transformer.
        pack: The layout, with one segment for each image.
        plan: The stage's anchors.
        state: (B, N, D).
        shown: Conditions next to the state.
        given: The other inputs of the segments.
        attention: The attention backend.
        lifter: How to lift; None for not at all.
        noise_level: The state's exact level, which may be rounded in `given`.
        compiler: Compiles the stage; None runs it eagerly.
    """
    layout = pack.layout
    if plan.is_dense:
        lifter = None
    level: Tensor | float = 1.0  # unused; a number is compiled into the graph, so it must be the same at every step
    is_pooled = isinstance(plan, PooledPlan)
    if lifter == "clean" or is_pooled:
        level = state.new_full((), noise_level, dtype=torch.promote_types(state.dtype, torch.float32))

    def stage_of(blocks: Blocks) -> StageFunction:
        def stage(
            model: nn.Module,
            pack: Pack,
            plan: LiftPlan | PooledPlan,
            state: Tensor,
            shown: Shown,
            given: Conditions,
            level: Tensor | float,
        ) -> tuple[Tensor, Tensor | None]:
            extra = None if shown.extra is None else plan.show_beside(shown.extra)
            own = plan.show(state, level)
            tokens = beside(own, extra, shown.references).flatten(0, 1)
            velocity = run_packed(model, pack, tokens, given, attention, blocks)
            values = velocity.unflatten(0, (state.shape[0], -1))
            if shown.references is not None:
                values = values[:, : plan.anchors.shape[1]]
            return values, None if lifter is None else plan.lift(values, state, level, lifter, own)

        return stage

    plain = stage_of(plain_blocks())
    if compiler is None:
        return plain(model, pack, plan, state, shown, given, level)
    signature = (
        layout.text.lengths,
        layout.image.lengths,
        plan.grid if lifter or is_pooled else None,
        plan.factor if isinstance(plan, PooledPlan) else 1,
        state.shape,
        state.dtype,
        state.device,
        shown.extra is None,
        None if shown.references is None else shown.references.shape,
        given.guidance is None,
        lifter,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        attention.name,
    )
    reason = "hooks on its blocks (offloading) must run between them" if pack.hooked else None
    shown = Shown(*(None if x is None else x.contiguous() for x in (shown.extra, shown.references)))
    arguments = (model, pack, plan, state.contiguous(), shown, given, level)
    result: tuple[Tensor, Tensor | None] = compiler.run(
        signature, plain, *arguments, regional=stage_of(regional_blocks()), reason=reason
    )
    return result


def _double(
    block: Any, text: Tensor, image: Tensor, condition: Tensor, pack: Pack, attend: Attend
) -> tuple[Tensor, Tensor]:
    layout, attn = pack.layout, block.attn
    image_parts, text_parts = (
        norm.linear(norm.silu(condition)).chunk(6, dim=1) for norm in (block.norm1, block.norm1_context)
    )
    image_heads = _heads(attn, _modulate(block.norm1.norm(image), image_parts[0], image_parts[1], layout.image))
    text_heads = _added_heads(
        attn, _modulate(block.norm1_context.norm(text), text_parts[0], text_parts[1], layout.text)
    )
    query, key, value = (
        layout.join(of_text, of_image) for of_text, of_image in zip(text_heads, image_heads, strict=True)
    )
    text_out, image_out = layout.split(_attended(query, key, value, pack, attend))
    image = _add_gated(image, attn.to_out[1](attn.to_out[0](image_out)), image_parts[2], layout.image)
    text = _add_gated(text, attn.to_add_out(text_out), text_parts[2], layout.text)
    between = _modulate(block.norm2(image), image_parts[3], image_parts[4], layout.image)
    image = _add_gated(image, block.ff(between), image_parts[5], layout.image)
    between = _modulate(block.norm2_context(text), text_parts[3], text_parts[4], layout.text)
    text = _add_gated(text, block.ff_context(between), text_parts[5], layout.text)
    return _clip_half(text), image


def _single(block: Any, documents: Tensor, condition: Tensor, pack: Pack, attend: Attend) -> Tensor:
    segments = pack.layout.documents
    shift, scale, gate = block.norm.linear(block.norm.silu(condition)).chunk(3, dim=1)
    normed = _modulate(block.norm.norm(documents), shift, scale, segments)
    attended = _attended(*_heads(block.attn, normed), pack, attend)
    out = block.proj_out(torch.cat([attended, block.act_mlp(block.proj_mlp(normed))], dim=1))
    return _clip_half(_add_gated(documents, out, gate, segments))


def _heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries, keys and values (T, heads, head_dim) of image tokens, or of documents."""
    fused = attn.fused_projections
    query, key, value = attn.to_qkv(x).chunk(3, dim=-1) if fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
    return _normed_heads(attn, query, key, value, attn.norm_q, attn.norm_k)


def _added_heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries, keys and values (T, heads, head_dim) of text tokens."""
    if attn.fused_projections:
        query, key, value = attn.to_added_qkv(x).chunk(3, dim=-1)
    else:
        query, key, value = attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x)
    return _normed_heads(attn, query, key, value, attn.norm_added_q, attn.norm_added_k)


def _normed_heads(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, norm_q: nn.Module, norm_k: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))
    return norm_q(query), norm_k(key), value


def _attended(query: Tensor, key: Tensor, value: Tensor, pack: Pack, attend: Attend) -> Tensor:
    query, key = (apply_rotary_emb(x[None], pack.rotary, sequence_dim=1)[0] for x in (query, key))
    return attend(query, key, value, pack.layout).flatten(1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    x, shift, scale = segments.beside(x, shift, scale)
    return segments.flat(x * (1 + scale) + shift)


def _add_gated(x: Tensor, update: Tensor, gate: Tensor, segments: Segments) -> Tensor:
    update, gate = segments.beside(update, gate)
    return x + segments.flat(gate * update)


def _clip_half(x: Tensor) -> Tensor:
    return x.clip(-_HALF_RANGE, _HALF_RANGE) if x.dtype == torch.float16 else x
