"""Trains the tokenizers and the two text encoders by themselves, before the transformer.

FLUX gives its text tokens no positions, so the embeddings themselves must say which colour belongs to which object. The
T5 encoder learns this here: from the embedding of every word, a linear map must predict all claims of that part of the
caption. From CLIP's pooled vector, a linear map must predict the claims of the whole caption. Captions are padded to
random lengths, because a pipeline pads to a fixed length without a mask.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from jitaccel.evaluation.scenes.captions import Caption, Claims, describe
from jitaccel.evaluation.scenes.prompts import training_landscape
from jitaccel.evaluation.scenes.scene import ATTRIBUTES

from .log import TrainingLog, warmup_cosine

WIDTH = 128
LENGTHS, LENGTH_SHARES = (40, 48, 64, 128), (0.55, 0.3, 0.1, 0.05)  # of padded captions; no caption is above 36 tokens
BATCH = 40
_SPELLING = [chr(c) for c in range(33, 127)]


def captions(count: int, rng: np.random.Generator) -> list[Caption]:
    """Returns captions of random landscapes."""
    return [describe(training_landscape(rng), rng) for _ in range(count)]


def as_typed(text: str, rng: np.random.Generator) -> str:
    """Returns a caption as people type it, sometimes with an initial capital, sometimes with a final full stop."""
    text = text[0].upper() + text[1:] if text and rng.random() < 0.15 else text
    return text + "." if text and rng.random() < 0.15 else text


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
    """Returns whole words with their log frequency, and single characters with much lower scores for other words."""
    counts = Counter(word.strip(".,") for text in corpus for word in text.split())
    total = sum(counts.values())
    pieces = [(special, 0.0) for special in ("<pad>", "</s>", "<unk>")]
    pieces += [(f"▁{word}", math.log(count / total)) for word, count in sorted(counts.items()) if len(word) > 1]
    pieces += [("▁a", math.log(counts["a"] / total)), ("▁", -14.0)]
    return pieces + [(character, -3.0 if character in ",." else -14.0) for character in _SPELLING]


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


def train_text(out: Path, updates: int, seed: int = 1, num_captions: int = 20_000) -> None:
    """Trains `tokenizer`, `text_encoder` (CLIP), `tokenizer_2` and `text_encoder_2` (T5), and saves them in `out`."""
    rng = np.random.default_rng([0x74657874, seed])
    torch.manual_seed(seed)
    corpus = captions(num_captions, rng)
    clip_tokens, t5_tokens = train_tokenizers([as_typed(caption.text, rng) for caption in corpus])
    clip, t5 = new_encoders(clip_tokens, t5_tokens)
    heads = nn.ModuleDict({"word": nn.Linear(WIDTH, num_answers()), "pooled": nn.Linear(WIDTH, num_answers())})
    modules = nn.ModuleList([clip, t5, heads])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(60, updates))
    log = TrainingLog(out / "text.jsonl", every=50)
    for update in range(updates):
        chosen = [corpus[k] for k in rng.integers(len(corpus), size=BATCH)]
        length = int(rng.choice(LENGTHS, p=LENGTH_SHARES))
        texts = [as_typed(caption.text, rng) for caption in chosen]
        ids = t5_tokens(
            texts, padding="max_length", max_length=length, return_offsets_mapping=True, return_tensors="pt"
        )
        targets = [_word_targets(*pair) for pair in zip(chosen, ids.offset_mapping.tolist(), strict=True)]
        words = claims_loss(heads["word"](t5(ids.input_ids)[0]), torch.stack(targets))
        pooled = clip(clip_tokens(texts, padding=True, return_tensors="pt").input_ids).pooler_output
        facts = claims_loss(heads["pooled"](pooled), torch.stack([_targets(c.claims) for c in chosen]))
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


def num_answers() -> int:
    """Returns the number of scores for one claim of each attribute, where silence counts as a value."""
    return sum(len(values) + 1 for values in ATTRIBUTES.values())


def claims_loss(answers: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross entropy of `(..., num_answers())` against targets `(..., attributes)`, ignoring -100."""
    parts = answers.split([len(values) + 1 for values in ATTRIBUTES.values()], dim=-1)
    losses = [F.cross_entropy(p.flatten(0, -2), targets[..., k].flatten()) for k, p in enumerate(parts)]
    return torch.stack(losses).mean()


def _targets(claims: Claims) -> Tensor:
    """Returns the index of the claimed value of each attribute; the last index is silence."""
    return torch.tensor(
        [values.index(claims[name]) if name in claims else len(values) for name, values in ATTRIBUTES.items()]
    )


def _word_targets(caption: Caption, offsets: Sequence[tuple[int, int]]) -> Tensor:
    """Returns the claims of the caption's part around each token, `(length, attributes)`; -100 outside of all parts."""
    found = torch.full((len(offsets), len(ATTRIBUTES)), -100)
    for start, end, claims in caption.parts:
        found[[k for k, (_, last) in enumerate(offsets) if start < last <= end]] = _targets(claims)
    return found
