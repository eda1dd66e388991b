"""Features used together with acceleration, and codebases: the rows and columns of docs/compatibility.md.

    python -m tests.support.compatibility           # writes the table
    python -m tests.support.compatibility --check   # reports whether it is up to date

Every cell is a test in tests/patches/test_compatibility.py, which fails if the cell is wrong.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from tests.support import tiny
from tests.support.models import noise
from tests.support.pipelines import call_of, chroma_pipeline, flux2_pipeline, flux_pipeline
from tests.support.tiny import TEXT_TOKENS, WIDTH

CPU = torch.device("cpu")
DOC = Path(__file__).parents[2] / "docs" / "compatibility.md"
_BLOCK = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)


# Columns


@dataclass(frozen=True)
class Codebase:
    """A pipeline and one call of it. `execution` is that of a sparse generation without any further feature."""

    make: Callable[[], Any]
    call: Mapping[str, Any]
    execution: str


def _embedded(**more: Any) -> dict[str, Any]:
    call = {"prompt_embeds": noise(1, 1, TEXT_TOKENS, WIDTH), "output_type": "latent", "return_dict": False}
    side = 4 * tiny.GRID[0]
    return {**call, "height": side, "width": side, "num_inference_steps": 3, **more}


def _flux(name: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    return lambda: flux_pipeline(name), {**call_of(name), "num_inference_steps": 3}


_MASK = torch.ones(1, TEXT_TOKENS)
CODEBASES = {
    "FLUX.1": Codebase(*_flux("FluxPipeline"), "packed"),
    "Kontext": Codebase(*_flux("FluxKontextPipeline"), "packed"),
    "Fill": Codebase(*_flux("FluxFillPipeline"), "packed"),
    "ControlNet": Codebase(*_flux("FluxControlNetPipeline"), "indexed"),
    "FLUX.2": Codebase(lambda: flux2_pipeline("Flux2KleinPipeline"), _embedded(guidance_scale=1.0), "indexed"),
    "Chroma": Codebase(
        lambda: chroma_pipeline("ChromaPipeline"),
        _embedded(
            prompt_attention_mask=_MASK,
            negative_prompt_embeds=noise(2, 1, TEXT_TOKENS, WIDTH),
            negative_prompt_attention_mask=_MASK,
        ),
        "indexed",
    ),
}


# Rows


@dataclass(frozen=True)
class Company:
    """A feature used together with acceleration.

    Attributes:
        put: Adds it to the pipeline.
        call: Further arguments of a call.
        indexed: Whether it makes a packed model run indexed.
        only: The codebases that support it.
        changes: Whether a picture must differ with it; None if it may.
        is_exact: Whether a dense picture keeps its bits.
        packs_after: Whether a packed model stays packed if the feature is added after `apply`.
        refused: Text of the error if the feature is refused.
    """

    put: Callable[[Any], None] = lambda pipe: None
    call: Mapping[str, Any] = field(default_factory=dict)
    indexed: bool = False
    only: tuple[str, ...] = tuple(CODEBASES)
    changes: bool | None = False
    is_exact: bool = True
    packs_after: bool = False
    refused: str = ""

    def outcome(self, name: str, order: str = "before") -> str:
        """Returns the execution of a sparse generation in a codebase, or that it is refused; "" if unsupported there.

        `order` says whether the feature is added before or after `apply`.
        """
        if name not in self.only:
            return ""
        if self.refused:
            return "refused"
        is_indexed = self.indexed and not (order == "after" and self.packs_after)
        return "indexed" if is_indexed else CODEBASES[name].execution


def _linears(model: Any) -> list[str]:
    """Returns the names of linear layers inside the blocks that every codebase has."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and "blocks" in name
        and ("to_" in name or "proj" in name)
        and "lora" not in name
    ]


def _lora(pipe: Any, name: str = "one", seed: int = 0) -> None:
    import peft

    # Adapters start from random numbers; the fork keeps the global random state unchanged.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        names = [layer.removesuffix(".base_layer") for layer in _linears(pipe.transformer)]
        config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=names)
        pipe.transformer.add_adapter(config, adapter_name=name)


def _two_loras(pipe: Any) -> None:
    _lora(pipe)
    _lora(pipe, "two", 1)
    pipe.transformer.set_adapters(["one", "two"], [0.7, -0.4])


def _unloaded_lora(pipe: Any) -> None:
    _lora(pipe)
    pipe.transformer.delete_adapters(["one"])


def _fused_lora(pipe: Any) -> None:
    _lora(pipe)
    pipe.transformer.fuse_lora()


def _hotswapped_lora(pipe: Any) -> None:
    import peft

    _lora(pipe, "one", 1)
    other = {
        name.removesuffix(".weight") + ".weight": torch.flip(value, dims=(0,)) * 0.7
        for name, value in peft.get_peft_model_state_dict(pipe.transformer, adapter_name="one").items()
    }
    pipe.transformer.load_lora_adapter(other, prefix=None, adapter_name="one", hotswap=True)


def _ip_adapter(pipe: Any) -> None:
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = pipe.transformer
        model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(WIDTH, WIDTH, 2)])
        for block in model.transformer_blocks:
            block.attn.set_processor(
                FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=WIDTH, num_tokens=(2,), scale=[1.0])
            )


def _model_offload(pipe: Any) -> None:
    import accelerate

    pipe._offload = accelerate.cpu_offload_with_hook(pipe.transformer, CPU)[1]


def _sequential_offload(pipe: Any) -> None:
    import accelerate

    accelerate.cpu_offload(pipe.transformer, CPU)


def _group_offload(kind: str) -> Callable[[Any], None]:
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}

    def put(pipe: Any) -> None:
        pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **groups)

    return put


def _torchao(pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def _bitsandbytes(kind: str) -> Callable[[Any], None]:
    def put(pipe: Any) -> None:
        import bitsandbytes

        options: dict[str, Any] = {"has_fp16_weights": False}
        layer = bitsandbytes.nn.Linear8bitLt
        if kind == "nf4":
            options, layer = {"compute_dtype": torch.float32, "quant_type": "nf4"}, bitsandbytes.nn.Linear4bit
        for name in _linears(pipe.transformer):
            old = pipe.transformer.get_submodule(name)
            new = layer(old.in_features, old.out_features, old.bias is not None, **options)
            new.load_state_dict(old.state_dict(), strict=False)
            pipe.transformer.set_submodule(name, new.to(CPU))

    return put


def _compiled(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", dynamic=False)


def _compiled_in_place(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager", dynamic=False)


def _compiled_blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager", dynamic=False)


def _halve(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"latents": given["latents"] * 0.5} if step == 0 else {}


def _tiling(pipe: Any) -> None:
    pipe.vae = copy.deepcopy(pipe.vae)  # shared by the tests' pipelines
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()


def _cache(pipe: Any) -> None:
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))


_FLUX1 = ("FLUX.1", "Kontext", "Fill", "ControlNet")
_IP = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [noise(3, 1, 1, WIDTH)]}}
COMPANY: Mapping[str, Company] = {
    "LoRA, loaded": Company(_lora, changes=True),
    "LoRA, several with scales": Company(_two_loras, changes=True),
    "LoRA, scale of a call": Company(
        _lora, {"joint_attention_kwargs": {"scale": 0.5}}, changes=True, only=("FLUX.1", "Kontext", "ControlNet")
    ),
    "LoRA, hotswapped": Company(_hotswapped_lora, changes=True),
    "LoRA, fused": Company(_fused_lora, changes=True),
    "LoRA, unloaded": Company(_unloaded_lora),
    "IP-Adapter": Company(_ip_adapter, _IP, indexed=True, changes=True, only=("FLUX.1",)),
    "negative prompt": Company(
        call={"negative_prompt": "green", "true_cfg_scale": 2.0}, changes=True, only=("FLUX.1", "Kontext", "ControlNet")
    ),
    "model offload": Company(_model_offload),
    "sequential offload": Company(_sequential_offload, only=_FLUX1),  # fails in the others without jitaccel too
    "group offload, blocks": Company(_group_offload("block_level")),
    "group offload, leaves": Company(_group_offload("leaf_level")),
    "torchao int8 weights": Company(_torchao, changes=True),
    "bitsandbytes int8 weights": Company(_bitsandbytes("int8"), changes=True),
    "bitsandbytes nf4 weights": Company(_bitsandbytes("nf4"), changes=True),
    "`torch.compile(transformer)`": Company(_compiled, indexed=True, packs_after=True, is_exact=False),
    "`transformer.compile()`": Company(_compiled_in_place, is_exact=False),
    "`compile_repeated_blocks()`": Company(_compiled_blocks, indexed=True, is_exact=False),
    "attention backend": Company(
        lambda pipe: pipe.transformer.set_attention_backend("_native_math"), indexed=True, is_exact=False
    ),
    "fused QKV projections": Company(lambda pipe: pipe.transformer.fuse_qkv_projections(), only=_FLUX1),
    "callback that edits latents": Company(call={"callback_on_step_end": _halve}, changes=True),
    "VAE tiling and slicing": Company(_tiling, changes=None),
    "caches (FirstBlockCache and others)": Company(_cache, refused="cache", only=(*_FLUX1, "FLUX.2")),
}


# The table


def _cell(company: Company, codebase: str) -> str:
    before, after = company.outcome(codebase), company.outcome(codebase, "after")
    return before or "–" if before == after else f"{before}; {after} after `apply`"


def table() -> str:
    """Returns the table in Markdown."""
    lines = [f"| together with | {' | '.join(CODEBASES)} |", "|---" * (len(CODEBASES) + 1) + "|"]
    for name, company in COMPANY.items():
        cells = [_cell(company, codebase) for codebase in CODEBASES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Writes the table, or reports whether it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.compatibility", description="docs/compatibility.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is out of date")
    check = parser.parse_args(arguments).check
    old = DOC.read_text()
    new = _BLOCK.sub(lambda found: found[1] + table() + found[2], old)
    if check:
        return int(new != old)
    DOC.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
