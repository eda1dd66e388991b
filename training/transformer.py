"""Trains the flow-matching transformer on captioned scenes: first small pictures, then large ones.

Matrices inside the blocks are updated by Muon, all else by AdamW. The learning rate is constant until
`decay_updates` before the end, then falls linearly to zero, so that a run can be prolonged from any checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from jitaccel.scenes.draw import draw
from jitaccel.scenes.scene import Scene, describe, random_scene

from .log import TrainingLog
from .patch_encoder import encode_tokens


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of training. `picture_px` is the side of the pictures; `decay_updates` end the phase."""

    picture_px: int
    num_pictures: int
    batch: int
    updates: int
    muon_rate: float = 2e-3
    adam_rate: float = 1e-3
    warmup_updates: int = 50
    decay_updates: int = 0
    seed: int = 0

    def stopping_after(self, updates: int | None) -> Phase:
        """Returns the same phase with another number of updates, the decay at its new end."""
        return self if updates is None else replace(self, updates=updates)


def new_transformer() -> FluxTransformer2DModel:
    """Returns the untrained model; modulation and output start at zero, as adaptive norms want."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear"))):
            nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
    for module in (model.proj_out, model.norm_out.linear):
        nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
    return model


class TextEncoders:
    """The frozen encoders of `training.text`; `embed` returns T5 words `(B, length, 128)` and CLIP's `(B, 128)`."""

    def __init__(self, folder: Path) -> None:
        self._clip = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
        self._t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).eval()
        self._clip_tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self._t5_tokens = T5Tokenizer.from_pretrained(folder / "tokenizer_2")

    @torch.no_grad()
    def embed(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        ids = self._t5_tokens(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        clip_ids = self._clip_tokens(texts, padding=True, truncation=True, return_tensors="pt").input_ids
        return self._t5(ids)[0], self._clip(clip_ids).pooler_output


def train_transformer(folder: Path, phase: Phase, start: Path | None = None) -> None:
    """Runs one phase and writes `last.pt` (to go on from) and `ema/` (to use) into `folder`.

    Resumes from `folder/last.pt` where it exists; otherwise starts from the weights in the folder `start`, or afresh.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "phase.json").write_text(json.dumps(asdict(phase), indent=1))
    torch.manual_seed(phase.seed)
    model = new_transformer() if start is None else FluxTransformer2DModel.from_pretrained(start)
    average = FluxTransformer2DModel.from_config(model.config)
    average.load_state_dict(model.state_dict())
    optimizers = _optimizers(model, phase)
    done = _resume(folder / "last.pt", model, average, optimizers)
    text = TextEncoders(folder.parent / "text")
    log = TrainingLog(folder / "log.jsonl", every=20)
    saved = time.monotonic()
    for update, (tokens, texts, length) in zip(range(done, phase.updates), _batches(phase, done), strict=False):
        loss = _loss(model, tokens, *text.embed(texts, length))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = _rate_factor(update, phase)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["base_rate"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _follow(average, model, decay=0.99)
        log.add(update, loss=loss.item(), norm=float(norm))
        if time.monotonic() - saved > 240 or update + 1 == phase.updates:
            _save(folder, update + 1, model, average, optimizers)
            saved = time.monotonic()
    log.close()


def _optimizers(model: nn.Module, phase: Phase) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "transformer_blocks" in name else others).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=phase.muon_rate, momentum=0.95, weight_decay=0.01, ns_steps=4, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=phase.adam_rate, betas=(0.9, 0.99), weight_decay=0.0)
    for optimizer, rate in ((muon, phase.muon_rate), (adam, phase.adam_rate)):
        for group in optimizer.param_groups:
            group["base_rate"] = rate
    return [muon, adam]


def _rate_factor(update: int, phase: Phase) -> float:
    warm = min(1.0, (update + 1) / phase.warmup_updates)
    left = phase.updates - update
    return warm * min(1.0, left / phase.decay_updates if phase.decay_updates else 1.0)


def _batches(phase: Phase, skip: int) -> Iterator[tuple[Tensor, list[str], int]]:
    rng = np.random.default_rng([phase.seed, phase.picture_px])
    scenes = [random_scene(rng) for _ in range(phase.num_pictures)]
    tokens = torch.cat([_tokens(scenes[k : k + 50], phase.picture_px) for k in range(0, len(scenes), 50)])
    rng = np.random.default_rng([phase.seed, phase.picture_px, skip])
    while True:
        chosen = rng.integers(len(scenes), size=phase.batch)
        texts = ["" if rng.random() < 0.08 else _caption(scenes[k], rng) for k in chosen]
        length = int(rng.choice([28, 48, 128, 512], p=[0.85, 0.08, 0.05, 0.02]))
        keep = phase.batch if length < 512 else phase.batch // 2
        yield tokens[torch.from_numpy(chosen[:keep])].float(), texts[:keep], length


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    return describe(scene, rng)[0]


def _tokens(scenes: list[Scene], picture_px: int) -> Tensor:
    return encode_tokens(np.stack([draw(scene, picture_px) for scene in scenes])).half()


def _loss(model: FluxTransformer2DModel, clean: Tensor, words: Tensor, pooled: Tensor) -> Tensor:
    """Returns the flow-matching loss at logit-normal noise levels, some of them uniform."""
    batch, num_tokens, _ = clean.shape
    level = torch.sigmoid(0.5 + 1.1 * torch.randn(batch))
    level = torch.where(torch.rand(batch) < 0.15, torch.rand(batch), level)
    noise = torch.randn_like(clean)
    state = clean + level[:, None, None] * (noise - clean)
    side = round(num_tokens**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    velocity = model(
        hidden_states=state,
        encoder_hidden_states=words,
        pooled_projections=pooled,
        timestep=level,
        img_ids=ids,
        txt_ids=torch.zeros(words.shape[1], 3),
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - clean)


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def _save(folder: Path, update: int, model, average, optimizers) -> None:  # type: ignore[no-untyped-def]
    state = {
        "update": update,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(state, folder / "last.tmp")
    (folder / "last.tmp").replace(folder / "last.pt")
    average.save_pretrained(folder / "ema")


def _resume(path: Path, model, average, optimizers) -> int:  # type: ignore[no-untyped-def]
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["update"])
