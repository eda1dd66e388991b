"""Trains the flow-matching transformer on captioned landscapes of several sizes, as FLUX.1 was.

A batch has pictures of one size, either many small ones or a few large ones. Its number of tokens is about the same for
every size, so that all updates cost the same. Noise levels are shifted with the number of tokens, as in the pipeline's
scheduler. At every size a share of the levels lies above 0.9, because the layout is decided there.

Besides the velocity, a linear map from the features of a middle layer must predict what is drawn in each token
(representation alignment, Yu et al. 2024, arXiv:2410.06940, with the drawn truth instead of another network's
features). The map is discarded after training.

Muon updates the matrices inside the blocks, and AdamW everything else. The learning rate is constant until
`decay_updates` before the end and then falls linearly to zero, so that a run can be continued from any checkpoint.
Matrix products run in bfloat16 if the processor multiplies it natively; weights and updates stay float32.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from jitaccel.evaluation.scenes.captions import describe

from . import parallel
from .log import TrainingLog
from .muon import Muon, has_native_bfloat16
from .patch_encoder import NUM_FEATURES, PATCH, encode_tokens
from .pictures import NUM_LABELS, TOKEN_PX, PictureSet
from .text import LENGTH_SHARES, LENGTHS, as_typed

CHANNELS = NUM_FEATURES * (TOKEN_PX // PATCH) ** 2
SIZES: Mapping[str, tuple[str, int]] = {  # height x width in tokens -> the set they come from, and the height in tokens
    "16x16": ("256x256", 16),
    "24x24": ("256x256", 24),
    "32x32": ("256x256", 32),
    "16x24": ("192x128", 16),
    "24x16": ("128x192", 24),
}
SMALL: Mapping[str, float] = {"16x16": 0.8, "16x24": 0.1, "24x16": 0.1}
MIXED: Mapping[str, float] = {"16x16": 0.35, "16x24": 0.1, "24x16": 0.1, "24x24": 0.2, "32x32": 0.25}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of training.

    Attributes:
        updates: Number of updates. In the last `decay_updates`, the learning rate falls to zero.
        shares: Share of the updates for each size in `SIZES`.
        batch_tokens: Tokens of a batch, over all pictures and workers.
        alignment: Weight of the loss for predicting what is drawn.
        guidance: Scale of classifier-free guidance that is built into the learned velocity; 1 for none.
    """

    updates: int
    shares: Mapping[str, float]
    batch_tokens: int = 6144
    alignment: float = 0.3
    muon_rate: float = 2e-3
    adam_rate: float = 1e-3
    warmup_updates: int = 50
    decay_updates: int = 0
    guidance: float = 1.0
    seed: int = 0

    def stopping_after(self, updates: int | None) -> Phase:
        """Returns the same phase with another number of updates, and the decay at its new end."""
        return self if updates is None else replace(self, updates=updates)


def new_transformer() -> FluxTransformer2DModel:
    """Returns the untrained model; modulation and output start at zero, as usual with adaptive norms."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
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
    """The transformer with the map from its features to the drawn regions."""

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.labels = nn.Linear(transformer.inner_dim, NUM_LABELS)
        nn.init.zeros_(self.labels.weight), nn.init.zeros_(self.labels.bias)

    def forward(
        self, state: Tensor, level: Tensor, words: Tensor, pooled: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the velocity `(B, N, CHANNELS)` and the labels `(B, N, NUM_LABELS)`."""
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
                img_ids=ids,
                txt_ids=torch.zeros(words.shape[1], 3),
                return_dict=False,
            )[0]
        finally:
            hook.remove()
        return velocity.float(), self.labels(F.layer_norm(features[0].float(), features[0].shape[-1:])).float()


def token_ids(rows: int, columns: int) -> Tensor:
    """Returns diffusers' position ids `(rows * columns, 3)` for the tokens of a picture."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.flatten(0, 1)


def random_levels(count: int, tokens: int) -> Tensor:
    """Returns noise levels `(count,)`.

    They are logit-normal and shifted with the number of tokens, except for a quarter that is uniform in the whole range
    and an eighth that is uniform above 0.9.
    """
    shift = 0.5 + (tokens - 256) * 0.65 / 3840  # the pipeline's own shift, that of FLUX.1-dev
    level = torch.sigmoid(0.25 + shift + 1.2 * torch.randn(count))
    kind = torch.rand(count)
    level = torch.where(kind < 0.25, torch.rand(count), level)
    return torch.where(kind > 0.875, 0.9 + 0.1 * torch.rand(count), level)


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
    """Runs one phase and writes `last.pt` (to resume from) and `ema/` (to use) into `folder`.

    Resumes from `folder/last.pt` if it exists. Otherwise starts from the folder `start` (of a phase, or with weights
    only), or from scratch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "phase.json").write_text(json.dumps(asdict(phase), indent=1))
    torch.manual_seed(phase.seed)
    learner = Learner(new_transformer())
    average = FluxTransformer2DModel.from_config(learner.transformer.config)
    optimizers = _optimizers(learner, phase)
    done = _resume(folder, start, learner, average, optimizers)
    torch.manual_seed(1000 * done + parallel.rank())  # for noise and levels
    text = TextEncoders(folder.parent / "text")
    log = TrainingLog(folder / "log.jsonl", every=20) if parallel.rank() == 0 else None
    saved = time.monotonic()
    for update, batch in zip(range(done, phase.updates), _batches(folder.parent, phase, done), strict=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=has_native_bfloat16()):
            flow, drawn = _losses(learner, text, batch, phase)
        (flow + phase.alignment * drawn).backward()
        parallel.average_(parameter.grad for parameter in learner.parameters() if parameter.grad is not None)
        norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        rate = _rate_factor(update, phase)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["base_rate"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _follow(average, learner.transformer, decay=min(0.995, update / (update + 10)))
        if log is None:
            continue
        log.add(update, loss=flow.item(), drawn=drawn.item(), norm=float(norm))
        if time.monotonic() - saved > 120 or update + 1 == phase.updates:
            _save(folder, update + 1, learner, average, optimizers)
            saved = time.monotonic()
    if log is not None:
        log.close()


def _optimizers(learner: nn.Module, phase: Phase) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in learner.named_parameters():
        is_inner = parameter.ndim == 2 and "transformer_blocks" in name and "norm" not in name  # modulation is AdamW's
        (matrices if is_inner else others).append(parameter)
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


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tokens `(B, N, CHANNELS)`, the regions in them `(B, N, NUM_LABELS)`, their positions, captions, text length."""

    clean: Tensor
    labels: Tensor
    ids: Tensor
    texts: list[str]
    length: int


def _batches(run: Path, phase: Phase, skip: int) -> Iterator[Batch]:
    """Yields this worker's share of every batch. Size and text length are the same for all workers."""
    sets = {name: PictureSet(run / "pictures", name) for name in {SIZES[size][0] for size in phase.shares}}
    shared = np.random.default_rng([phase.seed, skip])
    rng = np.random.default_rng([phase.seed, skip, 1 + parallel.rank()])
    names, shares = list(phase.shares), list(phase.shares.values())
    for _ in itertools.count(skip):
        size = str(shared.choice(names, p=shares))
        source = sets[SIZES[size][0]]
        rows, columns = (int(side) for side in size.split("x"))
        length = int(shared.choice(LENGTHS, p=LENGTH_SHARES))
        count = max(1, round(phase.batch_tokens / (rows * columns) / parallel.num_workers()))
        chosen = rng.integers(len(source), size=count)
        texts = [
            "" if rng.random() < 0.1 else as_typed(describe(source.landscape(int(k)), rng).text, rng) for k in chosen
        ]
        yield Batch(
            clean=encode_tokens(source.pictures(chosen, rows)),
            labels=source.labels(chosen, rows),
            ids=token_ids(rows, columns),
            texts=texts,
            length=length,
        )


def _losses(learner: Learner, text: TextEncoders, batch: Batch, phase: Phase) -> tuple[Tensor, Tensor]:
    """Returns the flow-matching loss and the loss for predicting what is drawn.

    To build in guidance, the target is shifted by the effect of the text on the velocity (model guidance, Tang et al.
    2025, arXiv:2502.12154); the fixed point is the velocity guided with that scale.
    """
    clean, count = batch.clean, len(batch.texts)
    level = random_levels(count, clean.shape[1])
    noise = torch.randn_like(clean)
    state = clean + level[:, None, None] * (noise - clean)
    velocity, drawn = learner(state, level, *text.embed(batch.texts, batch.length), batch.ids)
    target = noise - clean
    if phase.guidance > 1:
        with torch.no_grad():
            plain = learner(state, level, *text.embed([""] * count, batch.length), batch.ids)[0]
            target += (1.0 - 1.0 / phase.guidance) * (velocity - plain)
    return F.mse_loss(velocity, target), F.mse_loss(drawn, batch.labels, reduction="sum") / drawn[..., 0].numel()


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def _save(
    folder: Path,
    update: int,
    learner: Learner,
    average: FluxTransformer2DModel,
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    state = {
        "update": update,
        "learner": learner.state_dict(),
        "average": average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(state, folder / "last.tmp")
    (folder / "last.tmp").replace(folder / "last.pt")
    average.save_pretrained(folder / "ema")


def _resume(
    folder: Path,
    start: Path | None,
    learner: Learner,
    average: FluxTransformer2DModel,
    optimizers: Sequence[torch.optim.Optimizer],
) -> int:
    """Loads the phase's last checkpoint and returns its update. Without one, loads `start`, moments too; returns 0."""
    resumed = (folder / "last.pt").exists()
    source = folder if resumed else start
    if source is None:
        return 0
    if not (source / "last.pt").exists():
        weights = FluxTransformer2DModel.from_pretrained(source).state_dict()
        learner.transformer.load_state_dict(weights)
        average.load_state_dict(weights)
        return 0
    state = torch.load(source / "last.pt", weights_only=True)
    learner.load_state_dict(state["learner"])
    average.load_state_dict(state["average"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        rates = [group["base_rate"] for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["base_rate"] = rate
    return int(state["update"]) if resumed else 0
