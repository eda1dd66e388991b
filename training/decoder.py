"""Trains the decoder of the embedded autoencoder on the closed-form latents of `patch_encoder`, and saves both.

The encoder's weights are set, not trained: every residual branch is zero, the two strided convolutions compute the
linear features, and constant channels turn the last group norm and its activation into a fixed scale and offset.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from jitaccel.evaluation.scenes.draw import draw
from jitaccel.evaluation.scenes.prompts import held_out_landscape

from .log import TrainingLog, warmup_cosine
from .muon import has_native_bfloat16
from .patch_encoder import NUM_FEATURES, encode, latent_statistics, patch_features
from .pictures import PictureSet

CROP_PX = 64
BATCH = 16
NUM_PICTURES = 1500
_CHANNELS = (32, 48, 64)
_LATENT_NOISE = 0.08  # maximum noise added to latents in training, in standard deviations of the latents
_FLOOR = 256.0  # size of the constant channels that make the encoder's last group norm a fixed scale
_SILU_OFFSET = 16.0  # silu(x + 16) = x + 16 to one part in ten thousand for the latents that occur
_LOG_VARIANCE = -20.0


def new_autoencoder() -> AutoencoderKL:
    shift, scale = latent_statistics()
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        latent_channels=NUM_FEATURES,
        norm_num_groups=2,
        sample_size=256,
        shift_factor=shift,
        scaling_factor=scale,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@torch.no_grad()
def write_encoder(vae: AutoencoderKL) -> None:
    """Sets the encoder's weights so that its mean equals `patch_encoder.encode` up to rounding."""
    encoder = vae.encoder
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.zero_()
            _bias(module).zero_()
    colours, halves = 3, 12
    encoder.conv_in.weight[range(colours), range(colours), 1, 1] = 1.0
    first, second = (encoder.down_blocks[k].downsamplers[0].conv for k in (0, 1))
    for k, (row, column) in enumerate((r, c) for r in (0, 1) for c in (0, 1)):
        for colour in range(colours):
            first.weight[k * colours + colour, colour, row, column] = 1.0
    filters = patch_features()  # (16, 3, 4, 4): the coarse offset is the strided pixel, the fine one the channel
    for k, (row, column) in enumerate((r, c) for r in (0, 1) for c in (0, 1)):
        second.weight[:NUM_FEATURES, k * colours : (k + 1) * colours, :2, :2] = filters[:, :, row::2, column::2]
    widen = [block.resnets[0].conv_shortcut for block in encoder.down_blocks[1:]]
    widen[0].weight[range(halves), range(halves), 0, 0] = 1.0
    _write_last_norm(encoder, widen[1])


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _write_last_norm(encoder: Any, shortcut: nn.Conv2d) -> None:
    """Splits the features over both groups, fills the rest with constants, and undoes the norm and activation."""
    half = _CHANNELS[-1] // 2
    places = [*range(NUM_FEATURES // 2), *range(half, half + NUM_FEATURES // 2)]
    constant = [k for k in range(2 * half) if k not in places]
    shortcut.weight[places, range(NUM_FEATURES), 0, 0] = 1.0
    _bias(shortcut)[constant] = _FLOOR * (1.0 - 2.0 * (torch.arange(len(constant)) % 2))
    deviation = _FLOOR * (len(constant) / (2 * half)) ** 0.5
    encoder.conv_norm_out.weight.fill_(deviation)
    encoder.conv_norm_out.bias.fill_(_SILU_OFFSET)
    encoder.conv_out.weight[range(NUM_FEATURES), places, 1, 1] = 1.0
    encoder.conv_out.bias[:NUM_FEATURES] = -_SILU_OFFSET
    encoder.conv_out.bias[NUM_FEATURES:] = _LOG_VARIANCE


@torch.no_grad()
def _start_decoder(vae: AutoencoderKL, offset: float = 4.0) -> None:
    """Gives the decoder zero residual branches and, in a quarter of its channels, constants that stabilise its norms.

    Otherwise a group norm over a smooth picture would remove its colour, and act differently on a crop than on the
    whole picture.
    """
    for module in vae.decoder.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.mul_(0.1)
            module.conv2.bias.zero_()
    stream = [vae.decoder.conv_in]
    for block in vae.decoder.up_blocks:
        stream += [resnet.conv_shortcut for resnet in block.resnets if resnet.conv_shortcut is not None]
        stream += [up.conv for up in block.upsamplers or ()]
    for conv in stream:
        steady = range(3, conv.out_channels, 4)
        conv.weight[steady] = 0.0
        conv.bias[steady] = offset * (1.0 - 2.0 * (torch.arange(len(steady)) % 2))
        if conv.in_channels > NUM_FEATURES:
            conv.weight[:, range(3, conv.in_channels, 4)] = 0.0


def train_decoder(run: Path, updates: int, seed: int = 0, num_pictures: int = NUM_PICTURES) -> None:
    """Trains the decoder on crops of large and small pictures, from slightly noisy latents; saves `vae` in `run`."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    vae = new_autoencoder()
    write_encoder(vae)
    _start_decoder(vae)
    decoder = vae.decoder.to(memory_format=torch.channels_last)
    average = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    source = PictureSet(run / "pictures", "256x256")
    chosen = rng.integers(len(source), size=num_pictures)
    large, small = chosen[: 2 * num_pictures // 3], chosen[2 * num_pictures // 3 :]
    pictures = [source.pictures(large), source.pictures(small, rows=16)]
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(40, updates))
    log = TrainingLog(run / "vae.jsonl", every=20)
    scale = latent_statistics()[1]
    for update in range(updates):
        x = _crops(pictures[int(rng.random() < 0.3)], rng)
        z = encode(x)
        z = z + _LATENT_NOISE / scale * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_native_bfloat16()):
            y = decoder(z.contiguous(memory_format=torch.channels_last)).float()
        loss = (y - x).abs().mean() + 0.5 * _edges(y - x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for name, p in decoder.named_parameters():
                average[name].lerp_(p, 1 - min(0.99, update / (update + 10)))
        log.add(update, loss=loss.item(), psnr_db=_psnr_db(y, x))
        if update % 500 == 499 or update + 1 == updates:
            _save(run / "vae", vae, average)
    log.close()


def _save(out: Path, vae: AutoencoderKL, average: dict[str, Tensor]) -> None:
    """Saves the autoencoder with the averaged decoder weights, without changing `vae`."""
    own = {name: p.detach().clone() for name, p in vae.decoder.named_parameters()}
    vae.decoder.load_state_dict(average)
    vae.save_pretrained(out)
    vae.decoder.load_state_dict(own)


@torch.no_grad()
def measure_psnr_db(vae: AutoencoderKL, size: int, count: int = 32) -> float:
    """Returns the mean peak signal-to-noise ratio of held-out drawings after encoding and decoding."""
    rng = np.random.default_rng([0x70736E72, size])
    found = []
    for _ in range(count):
        x = torch.from_numpy(draw(held_out_landscape(rng), size)).permute(2, 0, 1)[None].float() / 127.5 - 1
        found.append(_psnr_db(vae.decode(vae.encode(x).latent_dist.mode()).sample, x))
    return sum(found) / count


def _crops(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Returns crops whose corners lie on the patch grid."""
    side = pictures.shape[-1] - CROP_PX
    rows, columns = 4 * rng.integers(0, side // 4 + 1, size=(2, BATCH))
    chosen = zip(rng.integers(len(pictures), size=BATCH), rows, columns, strict=True)
    return torch.stack([pictures[k, :, r : r + CROP_PX, c : c + CROP_PX] for k, r, c in chosen]).contiguous()


def _edges(difference: Tensor) -> Tensor:
    return difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()


def _psnr_db(y: Tensor, x: Tensor) -> float:
    return float(-10 * torch.log10(F.mse_loss(y.detach().clamp(-1, 1), x) / 4))
