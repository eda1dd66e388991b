"""Times one packed forward of several images against a loop over the images and against padding to the longest.

Each image has its own anchors, 32 % of its grid, as in the first stage of 7x-paper. `loop` runs the model's own forward
image by image. `packed` runs all images as one packed sequence. `padded` pads all to the longest text and image, and
masks the padding in attention. Token counts do not include padding.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jitaccel.api import embedded_model
from jitaccel.execution.attention.choice import BACKENDS, Backend, choose_backend, varlen_attention
from jitaccel.execution.packing import PackedLayout
from jitaccel.generation.stopwatch import wait_for
from jitaccel.patches.flux.flops import flux_flops
from jitaccel.patches.flux.packed import Conditions, make_pack, packed_forward

from ..pipelines import FLUX_DEV, FLUX_QUARTER, random_transformer
from ..registry import Case, Measurement, Options, percentiles

DENSITY = 0.32
BATCHES = (1, 2, 4, 8)
_FLUX_GIB = 40  # 24 for weights, and the memory of eight images


@dataclass(frozen=True, kw_only=True)
class Image:
    """One segment: tokens (M, C), their ids (M, 3), text (L, E), its ids (L, 3), pooled (P,), level, guidance (1,)."""

    tokens: Tensor
    ids: Tensor
    text: Tensor
    text_ids: Tensor
    pooled: Tensor
    level: Tensor
    guidance: Tensor | None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + len(self.text)


def make_images(model: Any, grids: Sequence[tuple[int, int]], text_tokens: int, seed: int) -> list[Image]:
    """Returns one image for each grid, with anchors drawn at random."""
    device, dtype, settings = model.device, model.dtype, model.config
    generator = torch.Generator(device).manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    images = []
    for height, width in grids:
        places = (
            torch.randperm(height * width, generator=generator, device=device)[: int(DENSITY * height * width)]
            .sort()
            .values
        )
        ids = torch.stack([torch.zeros_like(places), places // width, places % width], dim=1).to(dtype)
        images.append(
            Image(
                tokens=normal(len(places), settings.in_channels),
                ids=ids,
                text=normal(text_tokens, settings.joint_attention_dim),
                text_ids=torch.zeros(text_tokens, 3, device=device, dtype=dtype),
                pooled=normal(settings.pooled_projection_dim),
                level=torch.full((1,), 0.9, device=device, dtype=dtype),
                guidance=torch.full((1,), 3.5, device=device) if settings.guidance_embeds else None,
            )
        )
    return images


Pass = Callable[[], Any]


def loop(model: Any, images: Sequence[Image]) -> Pass:
    """Returns a pass with the model's own forward, image by image."""

    def run() -> list[Tensor]:
        return [
            model(
                hidden_states=image.tokens[None],
                encoder_hidden_states=image.text[None],
                pooled_projections=image.pooled[None],
                timestep=image.level,
                img_ids=image.ids,
                txt_ids=image.text_ids,
                guidance=image.guidance,
                return_dict=False,
            )[0][0]
            for image in images
        ]

    return run


def packed(model: Any, images: Sequence[Image], attention: Backend) -> Pass:
    """Returns a pass with one packed forward of all images. The pack is made once, as in a stage."""
    pack = make_pack(model, [image.text_ids for image in images], [image.ids for image in images])

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
        return varlen_attention(query, key, value, layout, attention)

    return lambda: packed_forward(model, pack, *_inputs(images), attend)


def padded(model: Any, images: Sequence[Image]) -> Pass:
    """Returns a pass with one forward of all images, padded to the longest and masked in attention."""
    longest = max(len(image.tokens) for image in images)
    wide = [
        Image(
            tokens=_padded(image.tokens, longest),
            ids=_padded(image.ids, longest),
            text=image.text,
            text_ids=image.text_ids,
            pooled=image.pooled,
            level=image.level,
            guidance=image.guidance,
        )
        for image in images
    ]
    pack = make_pack(model, [image.text_ids for image in wide], [image.ids for image in wide])
    length = wide[0].num_tokens
    counts = torch.tensor([image.num_tokens for image in images], device=model.device)
    is_token = torch.arange(length, device=model.device) < counts[:, None]
    mask = None if len(set(counts.tolist())) == 1 else is_token[:, None, None]

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
        query, key, value = (x.unflatten(0, (len(wide), length)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(0, 1)

    return lambda: packed_forward(model, pack, *_inputs(wide), attend)


def _padded(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, (0, 0, 0, rows - len(x)))


def _inputs(images: Sequence[Image]) -> tuple[Tensor, Conditions]:
    guidance = [image.guidance for image in images if image.guidance is not None]
    return torch.cat([image.tokens for image in images]), Conditions(
        text=torch.cat([image.text for image in images]),
        pooled=torch.stack([image.pooled for image in images]),
        level=torch.cat([image.level for image in images]),
        guidance=torch.cat(guidance) if guidance else None,
    )


def measure(
    options: Options, make: Callable[[Options], Any], sizes: Mapping[str, Sequence[tuple[int, int]]], text_tokens: int
) -> Iterator[Measurement]:
    """Yields a row for each way, batch and mix of sizes; the ways take turns."""
    model = make(options)
    with torch.no_grad():
        for mix, grids in sizes.items():
            for batch in BATCHES:
                if batch == 1 and mix != "equal":
                    continue
                chosen = [grids[k % len(grids)] for k in range(batch)]
                images = make_images(model, chosen, text_tokens, options.seed)
                yield from _rows(model, images, chosen, mix, options)


def _rows(
    model: Any, images: Sequence[Image], grids: Sequence[tuple[int, int]], mix: str, options: Options
) -> Iterator[Measurement]:
    device, dtype, head_dim = model.device, model.dtype, model.config.attention_head_dim
    ways: dict[str, Pass] = {"loop": loop(model, images), "padded": padded(model, images)}
    for backend in BACKENDS:
        if not backend.unsupported_reasons(device, dtype, head_dim):
            usable = choose_backend(backend.name, device, dtype, head_dim)
            ways[f"packed {backend.name}"] = packed(model, images, usable)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(options.repeat):
        for name, way in ways.items():
            seconds[name].append(_seconds(way, options.device))
    base = percentiles(seconds["loop"])[0]
    tokens = sum(image.num_tokens for image in images)
    flops = sum(flux_flops(model.config, len(image.tokens), len(image.text)) for image in images)
    for name, way in ways.items():
        median, low, high = percentiles(seconds[name])
        fields = {
            "way": name,
            "mix": mix,
            "batch": len(images),
            "grids": [list(grid) for grid in grids],
            "density": DENSITY,
            "text_tokens": len(images[0].text),
            "tokens": tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "seed": options.seed,
            "repeats": options.repeat,
            "median_s": round(median, 6),
            "p20_s": round(low, 6),
            "p80_s": round(high, 6),
            "tokens_per_s": round(tokens / median, 1),
            "gflop": round(flops / 1e9, 3),
            "peak_mib_over_before": _peak_mib(way, options.device),
            "speedup_to_loop": round(base / median, 4),
        }
        yield Measurement(line=_line(fields), fields=fields)


def _line(f: Mapping[str, Any]) -> str:
    peak = "" if f["peak_mib_over_before"] is None else f", peak {f['peak_mib_over_before']:.0f} MiB more"
    return (
        f"{f['mix']:6} batch {f['batch']}  {f['way']:20} {1e3 * f['median_s']:9.2f} ms ({1e3 * f['p20_s']:.2f} to "
        f"{1e3 * f['p80_s']:.2f})  {f['tokens_per_s']:9.0f} tokens/s  {f['speedup_to_loop']:.3f}x loop{peak}"
    )


def _seconds(way: Pass, device: torch.device) -> float:
    wait_for(device)
    started = time.perf_counter()
    way()
    wait_for(device)
    return time.perf_counter() - started


def _peak_mib(way: Pass, device: torch.device) -> float | None:
    """Returns the peak memory of one forward beyond what was used before; None if the system does not report it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        torch.cuda.synchronize(device)
        return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
    forget = Path("/proc/self/clear_refs")
    try:
        forget.write_text("5")  # the peak is counted from here
    except OSError:
        return None
    before_kib = _status_kib("VmRSS")
    way()
    return round((_status_kib("VmHWM") - before_kib) / 2**10, 1)


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _embedded(options: Options) -> Any:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(embedded_model() / "transformer", torch_dtype=torch.float32)
    return model.eval().to(options.device)


def _random(options: Options, settings: Mapping[str, Any], dtype: torch.dtype) -> Any:
    return random_transformer(settings, options.device, dtype, options.seed)


def _no_embedded(options: Options) -> str | None:
    folder = embedded_model() / "transformer"
    return None if folder.is_dir() else f"no embedded model in {folder}"


def _no_large_cuda(options: Options) -> str | None:
    if options.device.type != "cuda":
        return "no CUDA device"
    gib = torch.cuda.get_device_properties(options.device).total_memory / 2**30
    return None if gib >= _FLUX_GIB else f"needs {_FLUX_GIB} GiB of GPU memory, got {gib:.0f}"


CASES: tuple[Case, ...] = (
    Case(
        group="packing",
        size="small",
        name="embedded model, 32 % of 32x32 tokens, or of 16x16, 24x24 and 32x32",
        run=functools.partial(
            measure,
            make=_embedded,
            sizes={"equal": [(32, 32)], "mixed": [(16, 16), (24, 24), (32, 32)]},
            text_tokens=48,
        ),
        why_not=_no_embedded,
    ),
    Case(
        group="packing",
        size="large",
        name="random transformer of width 768 and 3 blocks, 32 % of 64x64 tokens, or of 32x32, 48x48 and 64x64",
        run=functools.partial(
            measure,
            make=functools.partial(_random, settings=FLUX_QUARTER, dtype=torch.float32),
            sizes={"equal": [(64, 64)], "mixed": [(32, 32), (48, 48), (64, 64)]},
            text_tokens=128,
        ),
        why_not=lambda options: None,
    ),
    Case(
        group="packing",
        size="flux",
        name="FLUX.1-dev's size (bfloat16), 32 % of 1024x1024, or of 512x512, 768x768 and 1024x1024",
        run=functools.partial(
            measure,
            make=functools.partial(_random, settings=FLUX_DEV, dtype=torch.bfloat16),
            sizes={"equal": [(64, 64)], "mixed": [(32, 32), (48, 48), (64, 64)]},
            text_tokens=512,
        ),
        why_not=_no_large_cuda,
    ),
)
