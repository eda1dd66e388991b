"""Trains the tokenizers and the two text encoders, alone, before the transformer.

FLUX gives its text tokens no positions, so which colour belongs to which shape has to be in the embeddings
themselves. The T5 encoder learns that here: from every word it must tell all that the caption says of the thing the
word belongs to. Captions are padded to random lengths, since a pipeline pads to 512 and masks nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from jitaccel.evaluation.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Claim,
    describe,
    random_scene,
)

from .log import TrainingLog, warmup_cosine

WIDTH = 128
BATCH = 40
_SPELLING = [chr(c) for c in range(33, 127)]
_KINDS: tuple[Sequence[str], ...] = (SHAPES, tuple(COLOURS), TEXTURES, tuple(SIZES), tuple(PLACES))  # order of Claim
_BACKGROUND = re.compile(r" on an? (\w+) background")


def captions(count: int, rng: np.random.Generator) -> list[tuple[str, tuple[Claim, ...]]]:
    """Returns captions and claims, some of them written with a capital or a full stop, as people do."""
    found = []
    for _ in range(count):
        text, claims = describe(random_scene(rng), rng)
        text = text[0].upper() + text[1:] if rng.random() < 0.2 else text
        found.append((text + "." if rng.random() < 0.2 else text, claims))
    return found


def train_tokenizers(corpus: Sequence[str]) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Returns a byte-pair and a unigram tokenizer that know the words of the corpus and can spell any other."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    special = ["<|startoftext|>", "<|endoftext|>"]
    words = [text.lower() for text in corpus] + [" ".join(_SPELLING).lower()] * 2
    words += [" ".join(a + b for a in _SPELLING[64:90] for b in "ae")] * 2
    trainer = trainers.BpeTrainer(special_tokens=special, vocab_size=600, end_of_word_suffix="</w>")
    bpe.train_from_iterator(words, trainer)
    model = json.loads(bpe.model.__getstate__())
    clip = CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=77)
    return clip, T5Tokenizer(vocab=_unigram_pieces(corpus), extra_ids=0, model_max_length=512)


def _unigram_pieces(corpus: Sequence[str]) -> list[tuple[str, float]]:
    """Returns whole words by their log frequency, and single characters, much dearer, to spell the rest."""
    counts = Counter(word.rstrip(".") for text in corpus for word in text.split())
    total = sum(counts.values())
    pieces = [(special, 0.0) for special in ("<pad>", "</s>", "<unk>")]
    pieces += [(f"▁{word}", math.log(count / total)) for word, count in sorted(counts.items()) if len(word) > 1]
    pieces += [("▁a", math.log(counts["a"] / total)), ("▁A", math.log(counts["A"] / total)), ("▁", -14.0)]
    return pieces + [(character, -14.0) for character in _SPELLING]


def new_encoders(clip: CLIPTokenizer, t5: T5Tokenizer) -> tuple[CLIPTextModel, T5EncoderModel]:
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5), d_model=WIDTH, d_kv=32, d_ff=2 * WIDTH, num_layers=2, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=32, relative_attention_max_distance=64, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return CLIPTextModel(clip_config), T5EncoderModel(t5_config)


def train_text(out: Path, updates: int, seed: int = 1) -> None:
    """Trains and saves `tokenizer`, `text_encoder` (CLIP), `tokenizer_2` and `text_encoder_2` (T5) below `out`."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    corpus = captions(20_000, rng)
    clip_tokens, t5_tokens = train_tokenizers([text for text, _ in corpus])
    clip, t5 = new_encoders(clip_tokens, t5_tokens)
    heads = nn.ModuleDict({"word": nn.Linear(WIDTH, _num_word_targets()), "pooled": nn.Linear(WIDTH, _num_facts())})
    modules = nn.ModuleList([clip, t5, heads])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(100, updates))
    log = TrainingLog(out / "text.jsonl", every=50)
    for update in range(updates):
        batch = [corpus[k] for k in rng.integers(len(corpus), size=BATCH)]
        texts = [text for text, _ in batch]
        length = int(rng.choice([28, 48, 64, 128, 512], p=[0.7, 0.1, 0.1, 0.07, 0.03]))
        keep = BATCH if length <= 48 else max(2, 1024 // length)
        words, facts = _losses(clip, t5, heads, clip_tokens, t5_tokens, batch[:keep], texts[:keep], length)
        optimizer.zero_grad(set_to_none=True)
        (words + facts).backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        log.add(update, words=words.item(), facts=facts.item())
    log.close()
    for part, name in ((clip_tokens, ""), (t5_tokens, "_2")):
        part.save_pretrained(out / f"tokenizer{name}")
    clip.save_pretrained(out / "text_encoder")
    t5.save_pretrained(out / "text_encoder_2")


def _losses(clip, t5, heads, clip_tokens, t5_tokens, batch, texts, length):  # type: ignore[no-untyped-def]
    ids = t5_tokens(
        texts,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    predicted = heads["word"](t5(ids.input_ids)[0])
    offsets = ids.offset_mapping
    targets = torch.stack([word_targets(*pair, places) for pair, places in zip(batch, offsets, strict=True)])
    parts = predicted.split([len(k) + 1 for k in _KINDS] + [len(BACKGROUNDS)], dim=-1)
    words = sum(_word_loss(p.flatten(0, 1), targets[..., j].flatten()) for j, p in enumerate(parts))
    pooled = clip(
        clip_tokens(texts, padding=True, truncation=True, return_tensors="pt").input_ids
    ).pooler_output
    facts = torch.stack([_facts(*pair) for pair in batch])
    return words, 10 * F.binary_cross_entropy_with_logits(heads["pooled"](pooled), facts)


def _word_loss(predicted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross entropy over the words that have a target; 0 where a short batch has none."""
    total = F.cross_entropy(predicted, targets, ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum().clamp(min=1)


def _num_word_targets() -> int:
    return sum(len(kind) + 1 for kind in _KINDS) + len(BACKGROUNDS)


def word_targets(text: str, claims: Sequence[Claim], offsets: torch.Tensor) -> torch.Tensor:
    """Returns for each token `(length, 6)` what the caption says of its thing and of the background; -1: nothing."""
    targets = torch.full((len(offsets), len(_KINDS) + 1), -1)
    background = _BACKGROUND.search(text)
    end = background.start() if background else len(text)
    start = 0
    for phrase, claim in zip(text[:end].split(" and "), claims, strict=True):
        inside = (offsets[:, 1] > start) & (offsets[:, 1] <= start + len(phrase))
        for j, (kind, said) in enumerate(zip(_KINDS, astuple(claim), strict=True)):
            targets[inside, j] = len(kind) if said is None else list(kind).index(said)
        start += len(phrase) + len(" and ")
    if background:
        inside = (offsets[:, 1] > end) & (offsets[:, 1] <= background.end())
        targets[inside, -1] = list(BACKGROUNDS).index(background[1])
    return targets


def _num_facts() -> int:
    return len(SHAPES) * len(COLOURS) + len(SHAPES) * len(TEXTURES) + len(SHAPES) + len(BACKGROUNDS)


def _facts(text: str, claims: Sequence[Claim]) -> torch.Tensor:
    coloured = torch.zeros(len(SHAPES), len(COLOURS))
    textured = torch.zeros(len(SHAPES), len(TEXTURES))
    present = torch.zeros(len(SHAPES))
    behind = torch.zeros(len(BACKGROUNDS))
    for claim in claims:
        shape = SHAPES.index(claim.shape)
        present[shape] = 1
        if claim.colour:
            coloured[shape, list(COLOURS).index(claim.colour)] = 1
        if claim.texture:
            textured[shape, TEXTURES.index(claim.texture)] = 1
    if background := _BACKGROUND.search(text):
        behind[list(BACKGROUNDS).index(background[1])] = 1
    return torch.cat([coloured.flatten(), textured.flatten(), present, behind])
