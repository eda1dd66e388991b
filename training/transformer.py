"""Trains the flow-matching transformer on captioned scenes: first on windows of the pictures, then on whole ones.

Beside the velocity, a linear map of the features half-way must tell what is drawn in each token (alignment of the
representation, Yu et al. 2024, arXiv:2410.06940, with the drawn truth in place of another network's features). The
map is thrown away; it is what makes shapes and their attributes appear after minutes instead of hours.

What is where is decided at high noise, above level 0.8, and there most of the training of whole pictures takes place.
Until the learning rate falls, part of its batches are pictures of half the size at the same positions: they teach the
outline of things at a quarter of the cost.

Matrices inside the blocks are updated by Muon, all else by AdamW. The learning rate is constant until
`decay_updates` before the end, then falls linearly to zero, so that a run can be prolonged from any checkpoint.
"""

from __future__ import annotations

import itertools
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

from . import parallel
from .log import TrainingLog
from .muon import Muon
from .pictures import HALF, NUM_LABELS, WHOLE, Pictures, Window, random_window


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of training. `window_tokens`: tokens of a window, `None` for whole pictures; `batch` is that of all
    together; `alignment` weighs the loss of what is drawn; `decay_updates` end the phase, and until they begin the
    share `half_share` of the batches has pictures of half the size, four times as many. Noise levels are logit-normal
    around `level_mean`, one in six uniform. `guidance` is the scale of classifier-free guidance that the velocity
    learns to have built in, as FLUX.1-dev has; 1 for none."""

    window_tokens: int | None
    num_pictures: int
    batch: int
    updates: int
    alignment: float
    muon_rate: float = 2e-3
    adam_rate: float = 1e-3
    warmup_updates: int = 50
    decay_updates: int = 0
    half_share: float = 0.0
    level_mean: float = 0.5
    guidance: float = 1.0
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
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear"))):
            nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
    for module in (model.proj_out, model.norm_out.linear):
        nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
    return model


class Learner(nn.Module):
    """The transformer with the map from its features to what is drawn."""

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.labels = nn.Linear(transformer.inner_dim, NUM_LABELS)
        nn.init.zeros_(self.labels.weight), nn.init.zeros_(self.labels.bias)

    def forward(
        self, state: Tensor, level: Tensor, words: Tensor, pooled: Tensor, window: Window
    ) -> tuple[Tensor, Tensor]:
        """Returns the velocity `(B, N, 32)` and the labels `(B, N, NUM_LABELS)`."""
        features: list[Tensor] = []
        blocks = self.transformer.single_transformer_blocks
        middle = blocks[len(blocks) // 2 - 1]
        hook = middle.register_forward_hook(lambda module, inputs, output: features.append(output[1]))
        try:
            velocity = self.transformer(
                hidden_states=state,
                encoder_hidden_states=words,
                pooled_projections=pooled,
                timestep=level,
                img_ids=window.ids(),
                txt_ids=torch.zeros(words.shape[1], 3),
                return_dict=False,
            )[0]
        finally:
            hook.remove()
        return velocity, self.labels(F.layer_norm(features[0], features[0].shape[-1:]))


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

    Resumes from `folder/last.pt` where it exists; otherwise starts from the folder `start`, of a phase or of weights
    alone, or afresh.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "phase.json").write_text(json.dumps(asdict(phase), indent=1))
    torch.manual_seed(phase.seed)
    learner = Learner(new_transformer())
    average = FluxTransformer2DModel.from_config(learner.transformer.config)
    optimizers = _optimizers(learner, phase)
    done = _resume(folder, start, learner, average, optimizers)
    torch.manual_seed(1000 * done + parallel.rank())  # of noise and levels
    text = TextEncoders(folder.parent / "text")
    log = TrainingLog(folder / "log.jsonl", every=20) if parallel.rank() == 0 else None
    saved = time.monotonic()
    for update, (tokens, labels, window, texts, length) in zip(
        range(done, phase.updates), _batches(phase, done), strict=False
    ):
        unguided = text.embed([""] * len(texts), length) if phase.guidance > 1 else None
        flow, drawn = _losses(learner, tokens, labels, window, text.embed(texts, length), unguided, phase)
        (flow + phase.alignment * drawn).backward()
        parallel.average_(parameter.grad for parameter in learner.parameters() if parameter.grad is not None)
        norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        rate = _rate_factor(update, phase)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["base_rate"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _follow(average, learner.transformer, decay=min(0.99, update / (update + 10)))
        if log is None:
            continue
        log.add(update, loss=flow.item(), drawn=drawn.item(), norm=float(norm))
        if time.monotonic() - saved > 240 or update + 1 == phase.updates:
            _save(folder, update + 1, learner, average, optimizers)
            saved = time.monotonic()
    if log is not None:
        log.close()


def _optimizers(learner: nn.Module, phase: Phase) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in learner.named_parameters():
        (matrices if parameter.ndim == 2 and "transformer_blocks" in name else others).append(parameter)
    muon = Muon(matrices, lr=phase.muon_rate)
    adam = torch.optim.AdamW(others, lr=phase.adam_rate, betas=(0.9, 0.99), weight_decay=0.0)
    for optimizer, rate in ((muon, phase.muon_rate), (adam, phase.adam_rate)):
        for group in optimizer.param_groups:
            group["base_rate"] = rate
    return [muon, adam]


def _rate_factor(update: int, phase: Phase) -> float:
    warm = min(1.0, (update + 1) / phase.warmup_updates)
    left = phase.updates - update
    return warm * min(1.0, left / phase.decay_updates if phase.decay_updates else 1.0)


def _batches(phase: Phase, skip: int) -> Iterator[tuple[Tensor, Tensor, Window, list[str], int]]:
    """Yields this worker's share of every batch: tokens, labels, the window they lie in, captions and their length.

    Every worker has pictures of its own; only the length of the text is the same for all, that none waits for another.
    """
    pictures = Pictures.random(
        phase.num_pictures // parallel.num_workers(), np.random.default_rng([phase.seed, parallel.rank()])
    )
    shared = np.random.default_rng([phase.seed, skip])
    rng = np.random.default_rng([phase.seed, skip, 1 + parallel.rank()])
    halves = pictures.halved() if phase.half_share else pictures
    for update in itertools.count(skip):
        half = update < phase.updates - phase.decay_updates and shared.random() < phase.half_share
        share = (4 if half else 1) * phase.batch // parallel.num_workers()
        length = int(shared.choice([28, 48, 128, 512], p=[0.85, 0.08, 0.05, 0.02]))
        chosen = rng.integers(len(pictures.scenes), size=share if length < 512 else share // 2)
        texts = ["" if rng.random() < 0.08 else pictures.caption(k, rng) for k in chosen]
        window = random_window(rng, phase.window_tokens) if phase.window_tokens else HALF if half else WHOLE
        where, source = torch.from_numpy(chosen), halves if half else pictures
        tokens, labels = (window.of(grid[where]).float() for grid in (source.tokens, source.labels))
        yield tokens, labels, window, texts, length


def _losses(
    learner: Learner,
    clean: Tensor,
    labels: Tensor,
    window: Window,
    texts: tuple[Tensor, Tensor],
    unguided: tuple[Tensor, Tensor] | None,
    phase: Phase,
) -> tuple[Tensor, Tensor]:
    """Returns the flow-matching loss at logit-normal noise levels, some of them uniform, and that of what is drawn.

    unguided: the empty text for each picture, where guidance is to be built in. The target then is moved by what the
    text changes (model guidance, Tang et al. 2025, arXiv:2502.12154): its fixed point is the velocity guided by that
    scale.
    """
    batch = clean.shape[0]
    level = torch.sigmoid(phase.level_mean + 1.1 * torch.randn(batch))
    level = torch.where(torch.rand(batch) < 0.15, torch.rand(batch), level)
    noise = torch.randn_like(clean)
    state = clean + level[:, None, None] * (noise - clean)
    velocity, drawn = learner(state, level, *texts, window)
    target = noise - clean
    if unguided is not None:
        with torch.no_grad():
            target += (1.0 - 1.0 / phase.guidance) * (velocity - learner(state, level, *unguided, window)[0])
    return F.mse_loss(velocity, target), F.mse_loss(drawn, labels, reduction="sum") / labels[..., 0].numel()


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def _save(folder: Path, update: int, learner, average, optimizers) -> None:  # type: ignore[no-untyped-def]
    state = {
        "update": update,
        "learner": learner.state_dict(),
        "average": average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(state, folder / "last.tmp")
    (folder / "last.tmp").replace(folder / "last.pt")
    average.save_pretrained(folder / "ema")


def _resume(folder: Path, start: Path | None, learner, average, optimizers) -> int:  # type: ignore[no-untyped-def]
    """Loads the phase's last checkpoint and returns its update; else the one to start from, moments too: 0."""
    resumed = (folder / "last.pt").exists()
    if not resumed and start is None:
        return 0
    if start is not None and not resumed and not (start / "last.pt").exists():
        weights = FluxTransformer2DModel.from_pretrained(start).state_dict()
        learner.transformer.load_state_dict(weights)
        average.load_state_dict(weights)
        return 0
    state = torch.load((folder if resumed else start) / "last.pt", weights_only=True)
    learner.load_state_dict(state["learner"])
    average.load_state_dict(state["average"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        rates = [group["base_rate"] for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["base_rate"] = rate
    return int(state["update"]) if resumed else 0
