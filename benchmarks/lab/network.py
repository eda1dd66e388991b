"""Calls the embedded transformer at the anchors of each image, and counts the operations."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import _get_qkv_projections
from torch import Tensor

from jitaccel.patches.flux.flops import flux_flops


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Encoded prompts: words (B, length, width) and pooled (B, width)."""

    words: Tensor
    pooled: Tensor

    def part(self, chosen: slice) -> Texts:
        return Texts(words=self.words[chosen], pooled=self.pooled[chosen])


class SparseNetwork:
    """Calls a FLUX transformer on tokens of a grid. `flops` counts all calls since construction, over all images.

    With `mixed`, matrix products run in bfloat16 (autocast).
    """

    def __init__(self, transformer: Any, texts: Texts, grid: tuple[int, int], mixed: bool) -> None:
        self.transformer, self.texts, self.grid, self._mixed = transformer, texts, grid, mixed
        rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        self.ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
        self.flops = 0.0

    def __call__(self, state: Tensor, anchors: Tensor, level: float) -> Tensor:
        """Returns the velocity (B, M, D) float32 of the anchors' state (B, M, D); anchors are (B, M) raster indices."""
        if bool((anchors == anchors[:1]).all()):
            return self.at(state, self.ids[anchors[0]], level)
        self._count(anchors.shape)
        ids = self.ids[anchors]
        parts = [self._forward(state[k : k + 1], each, level, slice(k, k + 1)) for k, each in enumerate(ids)]
        return torch.cat(parts)

    def at(self, state: Tensor, ids: Tensor, level: float) -> Tensor:
        """Returns the velocity (B, M, D) float32 of tokens with position ids (M, 3), the same for all images."""
        self._count(state.shape[:2])
        return self._forward(state, ids, level, slice(None))

    def _forward(self, state: Tensor, ids: Tensor, level: float, images: slice) -> Tensor:
        texts = self.texts.part(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._mixed):
            velocity: Tensor = self.transformer(
                hidden_states=state,
                encoder_hidden_states=texts.words,
                pooled_projections=texts.pooled,
                timestep=torch.full((len(state),), level),
                img_ids=ids,
                txt_ids=torch.zeros(texts.words.shape[1], 3),
                return_dict=False,
            )[0]
        return velocity.float()

    def _count(self, shape: torch.Size) -> None:
        self.flops += flux_flops(self.transformer.config, shape[1], self.texts.words.shape[1], shape[0])


class _Attention:
    """An attention processor with additions for variants; each attention layer of the model has its own.

    It keeps keys and values of all tokens of the grid (`stale`), or records the share of attention to words
    (`watched`).
    """

    def __init__(self, num_words: int) -> None:
        self.num_words = num_words
        self.anchors: Tensor | None = None
        self.stale: tuple[Tensor, Tensor] | None = None
        self.is_stale = self.is_watched = False
        self.words_share: Tensor | None = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, image_rotary_emb: Any = None,
    ) -> Any:  # fmt: skip
        query, key, value = self._projected(attn, hidden_states, encoder_hidden_states)
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        if self.is_watched:
            self.words_share = self._share_of_words(query, key)
        if self.is_stale:
            key, value = self._with_stale(key, value)
        mixed = dispatch_attention_fn(query, key, value).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return mixed
        words, image = mixed.split_with_sizes([self.num_words, mixed.shape[1] - self.num_words], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(words)

    def _projected(self, attn: Any, image: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        projected = _get_qkv_projections(attn, image, words)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in projected[:3])
        query, key = attn.norm_q(query), attn.norm_k(key)
        if words is None:
            return query, key, value
        added = [x.unflatten(-1, (-1, attn.head_dim)) for x in projected[3:]]
        added = [attn.norm_added_q(added[0]), attn.norm_added_k(added[1]), added[2]]
        return tuple(torch.cat(pair, dim=1) for pair in zip(added, (query, key, value), strict=True))  # type: ignore[return-value]

    def _with_stale(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        fresh = (key[:, self.num_words :], value[:, self.num_words :])
        if self.stale is None:
            self.stale = (fresh[0].clone(), fresh[1].clone())
        else:
            for kept, new in zip(self.stale, fresh, strict=True):
                kept[:, self.anchors] = new
        words = (key[:, : self.num_words], value[:, : self.num_words])
        return torch.cat([words[0], self.stale[0]], dim=1), torch.cat([words[1], self.stale[1]], dim=1)

    def _share_of_words(self, query: Tensor, key: Tensor) -> Tensor:
        scores: Tensor = torch.einsum("bqhd,bkhd->bhqk", query[:, self.num_words :].float(), key.float())
        shares = (scores / query.shape[-1] ** 0.5).softmax(dim=-1)[..., : self.num_words].sum(dim=-1)
        return shares.mean(dim=1).float()


class StaleNetwork(SparseNetwork):
    """Lets anchors attend to inactive tokens as they were when last evaluated. For one image."""

    def __call__(self, state: Tensor, anchors: Tensor, level: float) -> Tensor:
        for processor in self._processors():
            processor.is_stale, processor.anchors = True, anchors[0]
        return super().__call__(state, anchors, level)

    def _processors(self) -> list[_Attention]:
        return [p for p in self.transformer.attn_processors.values() if isinstance(p, _Attention)]

    def _count(self, shape: torch.Size) -> None:
        super()._count(shape)
        config, num_tokens = self.transformer.config, self.grid[0] * self.grid[1]
        width = config.num_attention_heads * config.attention_head_dim
        pairs = (shape[1] + self.texts.words.shape[1]) * (num_tokens - shape[1])
        self.flops += 2 * 2 * (config.num_layers + config.num_single_layers) * pairs * width


@contextmanager
def watching(transformer: Any, num_words: int) -> Iterator[list[_Attention]]:
    """Installs the lab's processors within this context, and yields them in the order of the blocks."""
    before = dict(transformer.attn_processors)
    put = {name: _Attention(num_words) for name in before}
    transformer.set_attn_processor(dict(put))
    try:
        yield list(put.values())
    finally:
        transformer.set_attn_processor(before)


class CachedNetwork(SparseNetwork):
    """Reuses the last step's block outputs if the first block changed little (diffusers' FirstBlockCache).

    For one image. It is a context manager that removes the cache from the transformer at the end. Call `forget` before
    each stage.
    """

    def __init__(self, transformer: Any, texts: Texts, grid: tuple[int, int], mixed: bool, threshold: float) -> None:
        super().__init__(transformer, texts, grid, mixed)
        self._threshold = threshold
        self._stack = ExitStack()
        self._ran = {"num_layers": 0, "num_single_layers": 0}

    def __enter__(self) -> CachedNetwork:
        model = self.transformer
        for name, blocks in self._blocks().items():
            for block in blocks:
                hook = block.attn.register_forward_pre_hook(functools.partial(self._see, name))
                self._stack.callback(hook.remove)
        model.enable_cache(FirstBlockCacheConfig(threshold=self._threshold))
        self._stack.callback(model.disable_cache)
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def forget(self) -> None:
        """Drops the outputs of the last step."""
        self.transformer._reset_stateful_cache()

    def _blocks(self) -> dict[str, Any]:
        model = self.transformer
        return {"num_layers": model.transformer_blocks, "num_single_layers": model.single_transformer_blocks}

    def _see(self, kind: str, module: Any, inputs: Any) -> None:
        self._ran[kind] += 1

    def __call__(self, state: Tensor, anchors: Tensor, level: float) -> Tensor:
        self._ran = dict.fromkeys(self._ran, 0)
        with self.transformer.cache_context("lab"):
            velocity = super().__call__(state, anchors, level)
        config, words = dict(self.transformer.config), self.texts.words.shape[1]
        whole = flux_flops(config, anchors.shape[1], words)
        for kind, ran in self._ran.items():
            block = whole - flux_flops({**config, kind: config[kind] - 1}, anchors.shape[1], words)
            self.flops -= (config[kind] - ran) * block
        return velocity
