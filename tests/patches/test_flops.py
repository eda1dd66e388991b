"""Operations of a forward, and the dense control that follows from them."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.pipelines import FLUX_DEV
from jitaccel.errors import UnsupportedModelError
from jitaccel.method.config import JiTConfig
from jitaccel.method.presets import PRESETS
from jitaccel.patches import cost_of
from jitaccel.patches.flux.flops import flux_flops
from jitaccel.speed.control import dense_control, equivalent_dense_steps, schedule_flops
from tests.support.every_model import wan_transformer

COST = functools.partial(flux_flops, FLUX_DEV)


@pytest.mark.parametrize(("preset", "dense_steps"), [("7x-paper", 7.19), ("4x-paper", 12.08), ("dense", 50.0)])
def test_presets_cost_the_dense_steps_of_the_specification_on_flux_dev(preset: str, dense_steps: float) -> None:
    assert equivalent_dense_steps(PRESETS[preset], 4096, 512, COST) == pytest.approx(dense_steps, abs=0.005)


@pytest.mark.parametrize("guidance", [True, False])
def test_flops_are_those_that_torch_counts(guidance: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    settings = {
        "in_channels": 12,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 20,
        "pooled_projection_dim": 24,
        "guidance_embeds": guidance,
        "axes_dims_rope": (2, 2, 4),
    }
    batch, tokens, text_tokens = 2, 9, 5
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**settings)
        arguments = {
            "hidden_states": torch.empty(batch, tokens, 12),
            "encoder_hidden_states": torch.empty(batch, text_tokens, 20),
            "pooled_projections": torch.empty(batch, 24),
            "timestep": torch.empty(batch),
            "guidance": torch.empty(batch) if guidance else None,
            "img_ids": torch.empty(tokens, 3),
            "txt_ids": torch.empty(text_tokens, 3),
        }
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**arguments)
    assert flux_flops(model.config, tokens, text_tokens, batch) == counter.get_total_flops()


@pytest.mark.parametrize("model", ["Flux2Transformer2DModel", "ChromaTransformer2DModel"])
def test_flops_of_other_models_are_those_that_torch_counts(model: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    settings = {
        "in_channels": 12, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 20, "axes_dims_rope": (2, 2, 2, 2) if model.startswith("Flux2") else (2, 2, 4),
    }  # fmt: skip
    own = {"mlp_ratio": 2.5} if model.startswith("Flux2") else {"approximator_hidden_dim": 6, "approximator_layers": 2}
    batch, tokens, text_tokens = 2, 9, 5
    axes = len(settings["axes_dims_rope"])
    with torch.device("meta"):
        network = getattr(diffusers, model)(**settings, **own)
        arguments = {
            "hidden_states": torch.empty(batch, tokens, 12),
            "encoder_hidden_states": torch.empty(batch, text_tokens, 20),
            "timestep": torch.empty(batch),
            "img_ids": torch.empty(tokens, axes),
            "txt_ids": torch.empty(text_tokens, axes),
        }
        if model.startswith("Flux2"):
            arguments["guidance"] = torch.empty(batch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(**arguments)
    assert batch * cost_of(network)(tokens, text_tokens) == counter.get_total_flops()


def test_operations_without_a_formula_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"known by a formula, got WanTransformer3DModel.*handle.stats"):
        cost_of(wan_transformer())


def test_control_has_the_nearest_whole_number_of_dense_steps_on_the_same_levels() -> None:
    control = dense_control(PRESETS["7x-paper"], 4096, 512, COST)
    assert (control.steps, control.densities, control.schedule) == (7, (1.0,), "beta")
    assert dense_control(PRESETS["4x-paper"], 4096, 512, COST).steps == 12


@pytest.mark.parametrize("name", ["4x", "7x", "10x"])
def test_presets_have_the_most_dense_steps_that_their_names_allow_on_flux_dev(name: str) -> None:
    cost = equivalent_dense_steps(PRESETS[name], 4096, 512, COST)
    assert cost <= 50 / int(name.removesuffix("x")) < cost + 1


def test_control_of_levels_of_ones_own_is_refused() -> None:
    config = JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=2, schedule=(1.0, 0.5, 0.0))
    with pytest.raises(ValueError, match=r"dense_control: config\.schedule must"):
        dense_control(config, 64, 8, COST)


def test_caller_steps_have_to_be_given() -> None:
    config = PRESETS["7x-paper"].replace(steps="caller")
    assert equivalent_dense_steps(config, 4096, 512, COST, steps=11) == pytest.approx(7.19, abs=0.005)
    with pytest.raises(ValueError, match="equivalent_dense_steps: steps must"):
        equivalent_dense_steps(config, 4096, 512, COST)


def test_schedule_flops_add_up_over_the_stages() -> None:
    def count(tokens: int, text_tokens: int) -> int:
        return tokens + text_tokens

    assert schedule_flops(PRESETS["7x-paper"], 1024, 10, count, 11) == 4 * 337 + 3 * 624 + 4 * 1034
