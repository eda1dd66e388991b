"""ComfyUI's nodes: the stand-in's samplings against the method written out by hand, and what is refused."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.patches.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from jitaccel.patches.flux.flops import chroma_flops, flux_flops
from jitaccel.patches.layout import to_picture, to_tokens
from tests.support import comfy_stand_in as comfy
from tests.support import tiny
from tests.support.comfy_stand_in import KSAMPLER, BaseModel, CFGGuider, Flux, ModelPatcher
from tests.support.models import chroma_transformer, flux2_transformer, noise
from tests.support.pooled import POOLED, denoise_pooled
from tests.support.reference import denoise
from tests.support.tiny import CHANNELS, DENSE, GRID, NUM_TOKENS, SHORT, TEXT_TOKENS, WIDTH, relative_error

LEVELS = torch.tensor(jitaccel.noise_levels(SHORT))
SIZE = (2 * GRID[0], 2 * GRID[1])


@pytest.fixture(autouse=True)
def _comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    comfy.install(monkeypatch)


def flux1(extra: int = 0) -> Flux:
    """FLUX.1: patches of 2 x 2 of 4 channels; extra: further channels of a token."""
    inner = tiny.transformer(in_channels=CHANNELS + extra, out_channels=CHANNELS)
    return Flux(inner, patch_size=2, channels=CHANNELS // 4).eval()


def flux2() -> Flux:
    """FLUX.2: patches of one, four axes of ids, no pooled text."""
    return Flux(flux2_transformer(), patch_size=1, channels=CHANNELS, global_modulation=True).eval()


def condition(seed: int = 1, model: Any = None) -> dict[str, Any]:
    given = {"context": noise(seed, 1, TEXT_TOKENS, WIDTH), "guidance": torch.tensor([3.5])}
    return given if model is not None and model.axes == 4 else {**given, "y": noise(seed + 1, 1, WIDTH)}


def start(model: Any, seed: int = 0, batch: int = 1) -> Tensor:
    patch = model.patch_size
    return noise(seed, batch, CHANNELS // patch**2, GRID[0] * patch, GRID[1] * patch)


@contextmanager
def applied(model: Any, *given: Any, **more: Any) -> Iterator[jitaccel.Handle]:
    """Applies to a patcher that is kept meanwhile: a handle keeps nothing alive."""
    patcher = ModelPatcher(BaseModel(model))
    with jitaccel.apply(patcher, *given, **more) as handle:
        yield handle


def sample(patcher: Any, x: Tensor, levels: Tensor = LEVELS, *, sampler: Any = None, **more: Any) -> Tensor:
    """One sampling; more: what the guider's and its `sample` take."""
    guider = {name: more.pop(name) for name in ("conds", "cfg", "in_turn") if name in more}
    guider.setdefault("conds", {"positive": [condition(model=patcher.model.diffusion_model)]})
    kind = more.pop("guider", CFGGuider)
    return kind(patcher, **guider).sample(x, sampler or KSAMPLER(), levels, **more)


def by_hand(model: Any, x: Tensor, velocity_of: Any) -> Tensor:
    """The method around calls of the model on tokens that are gathered by hand."""
    state = to_tokens(x, model.patch_size)
    with torch.no_grad():
        final = denoise(velocity_of, SHORT, GRID, state, LEVELS.tolist()).states[-1]
    return to_picture(final, GRID, model.patch_size, x.shape[2:])


def on_tokens(model: Any, given: dict[str, Any]) -> Any:
    ids = model.process_img(start(model))[1]

    def velocity(tokens: Tensor, at: Tensor, level: float) -> Tensor:
        return model.forward_orig(
            tokens, ids[:, at], given["context"], torch.zeros(1, TEXT_TOKENS, model.axes), torch.tensor([level]),
            given.get("y"), given["guidance"],
        )  # fmt: skip

    return velocity


@pytest.mark.parametrize("make", [flux1, flux2], ids=["FLUX.1", "FLUX.2"])
def test_dense_is_the_models_own_and_remove_leaves_nothing(make: Any) -> None:
    patcher = ModelPatcher(BaseModel(make()))
    x = start(patcher.model.diffusion_model)
    expected = sample(patcher, x)
    with jitaccel.apply(patcher, DENSE) as handle:
        assert torch.equal(sample(patcher, x), expected)
        assert [step.tokens for step in handle.stats().steps] == [NUM_TOKENS] * 5
    assert not any(patcher.get_wrappers(kind, "jitaccel") for kind in patcher.wrappers)
    assert "forward_orig" not in vars(patcher.model.diffusion_model)


@pytest.mark.parametrize("make", [flux1, flux2], ids=["FLUX.1", "FLUX.2"])
def test_sparse_is_the_method_written_out_by_hand(make: Any) -> None:
    model = make()
    patcher = ModelPatcher(BaseModel(model))
    x, given = start(model), condition(model=model)
    expected = by_hand(model, x, on_tokens(model, given))
    with jitaccel.apply(patcher, SHORT) as handle:
        assert relative_error(sample(patcher, x), expected) < 1e-5
        stats = handle.stats()
    assert [step.tokens for step in stats.steps] == [50, 50, 93, 144, 144]
    assert (stats.grid, stats.text_tokens, stats.batch) == (GRID, TEXT_TOKENS, 1)
    assert stats.flops < 5 * stats.dense_step_flops


@pytest.mark.parametrize("preset", ["4x-paper", "7x-paper", "7x"])
@pytest.mark.parametrize("guided", [False, True])
def test_picture_is_the_one_of_diffusers_pipeline_route(preset: str, guided: bool) -> None:
    """The same weights, noise and levels; latents are patches of 2 x 2 in both, channel by channel."""
    model, positive, negative = flux1(), condition(1), condition(5)
    call: dict[str, Any] = {"prompt_embeds": positive["context"], "pooled_prompt_embeds": positive["y"]}
    if guided:
        call |= {"negative_prompt_embeds": negative["context"], "negative_pooled_prompt_embeds": negative["y"]}
        call |= {"true_cfg_scale": 3.0}
    pipe = tiny.pipeline(transformer=model.inner)
    with jitaccel.apply(pipe, preset) as handle:
        latents = to_tokens(start(model), 2)
        expected = tiny.generate(pipe, prompt=None, latents=latents, guidance_scale=3.5, **call)
        anchors = handle.stats().anchors
    levels = torch.tensor(jitaccel.noise_levels(jitaccel.PRESETS[preset]))
    with applied(model, preset) as handle:
        conds = {"positive": [positive], "negative": [negative]}
        made = sample(handle.target, start(model), levels, conds=conds, cfg=3.0 if guided else 1.0)
        assert all(torch.equal(a, b) for a, b in zip(handle.stats().anchors, anchors, strict=True))
    assert relative_error(to_tokens(made, 2), expected) < 1e-4


def test_costs_are_those_of_diffusers_on_the_same_network() -> None:
    model = flux1()
    with applied(model, SHORT) as handle:
        sample(handle.target, start(model))
        comfy_flops = handle.stats().dense_step_flops
    cost = flux_flops(model.inner.config, NUM_TOKENS, TEXT_TOKENS)
    assert comfy_flops == cost


@pytest.mark.parametrize("in_turn", [False, True], ids=["one batch", "in turn"])
def test_guided_branches_share_anchors_and_the_move_is_made_once(in_turn: bool) -> None:
    model = flux1()
    positive, negative = condition(1), condition(5)
    one, other = on_tokens(model, positive), on_tokens(model, negative)

    def guided(*call: Any) -> Tensor:
        first, second = one(*call), other(*call)
        return second + (first - second) * 3.0

    expected = by_hand(model, start(model), guided)
    with applied(model, SHORT) as handle:
        conds = {"positive": [positive], "negative": [negative]}
        made = sample(handle.target, start(model), conds=conds, cfg=3.0, in_turn=in_turn)
        assert {step.calls for step in handle.stats().steps} == {2}
    assert relative_error(made, expected) < 1e-5


def test_each_picture_of_a_batch_is_the_one_made_alone() -> None:
    model = flux1()
    with applied(model, SHORT) as handle:
        pictures = [start(model, seed) for seed in (1, 2)]
        alone = [sample(handle.target, x) for x in pictures]
        together = sample(handle.target, torch.cat(pictures))
        first, second = handle.stats().anchors[1]
    assert relative_error(together, torch.cat(alone)) < 1e-5 and not torch.equal(first, second)


def test_half_precision_network_keeps_the_samplers_state_in_float32() -> None:
    """What sparse steps add to the rounding of a dense sampling stays within it."""
    model, half = flux1(), flux1().to(torch.bfloat16)

    def error(config: Any) -> float:
        made = []
        for each, dtype in ((half, torch.bfloat16), (model, torch.float32)):
            patcher = ModelPatcher(BaseModel(each, dtype))
            with jitaccel.apply(patcher, config) as handle:
                made.append(sample(handle.target, start(model)))
        assert made[0].dtype == torch.float32
        return relative_error(*made)

    assert error(SHORT) < 1.2 * error(DENSE)


def test_picture_with_an_odd_side_is_padded_as_comfy_pads_it() -> None:
    model = flux1()
    x = noise(3, 1, 4, 23, 21)
    dense = sample(ModelPatcher(BaseModel(model)), x)
    with applied(model, SHORT) as handle:
        made = sample(handle.target, x)
        assert made.shape == x.shape and handle.stats().grid == (12, 11)
    with applied(model, DENSE) as handle:
        assert torch.equal(sample(handle.target, x), dense)


def test_residuals_references_and_further_channels_go_with_their_tokens() -> None:
    model = flux1(extra=CHANNELS)
    beside, reference = noise(7, 1, 4, *SIZE), noise(8, 1, 8, 10, 8)
    residual = noise(9, 1, NUM_TOKENS, WIDTH)
    given = condition()
    ids = model.process_img(noise(0, 1, 8, *SIZE))[1]
    extra = to_tokens(beside, 2)
    more, more_ids = model.process_img(reference, 1)

    def velocity(tokens: Tensor, at: Tensor, level: float) -> Tensor:
        img = torch.cat([torch.cat([tokens, extra[:, at]], dim=2), more], dim=1)
        padded = torch.cat([residual[:, at], torch.zeros(1, more.shape[1], WIDTH)], dim=1)
        return model.forward_orig(
            img, torch.cat([ids[:, at], more_ids], dim=1), given["context"], torch.zeros(1, TEXT_TOKENS, 3),
            torch.tensor([level]), given["y"], given["guidance"], control={"input": [padded], "output": [-padded]},
        )[:, : len(at)]  # fmt: skip

    expected = by_hand(model, start(model), velocity)
    whole = torch.cat([residual, torch.zeros(1, more.shape[1], WIDTH)], dim=1)
    control = {"input": [whole], "output": [-whole]}
    conds = {"positive": [{**given, "c_concat": beside, "ref_latents": [reference], "control": control}]}
    with applied(model, SHORT) as handle:
        assert relative_error(sample(handle.target, start(model), conds=conds), expected) < 1e-5


def test_stretches_of_references_are_counted_from_the_anchors() -> None:
    model = flux2()
    given = {**condition(model=model), "ref_latents": [noise(8, 1, CHANNELS, 5, 4)]}
    conds = {"positive": [{**given, "ref_latents_method": "index_timestep_zero"}]}
    with applied(model, SHORT) as handle:
        sample(handle.target, start(model), conds=conds)
    assert model.stretches == [(n + 20, [[n, n + 20]]) for n in (50, 50, 93, 144, 144)]


def test_residuals_that_are_none_stay_and_those_of_other_sizes_are_refused() -> None:
    model = flux1()
    control = {"input": [None, noise(9, 1, NUM_TOKENS, WIDTH)], "output": []}
    conds = {"positive": [{**condition(), "control": control}]}
    with applied(model, SHORT) as handle:
        model.inner.transformer_blocks.append(tiny.transformer(seed=1).transformer_blocks[0])
        control["input"].reverse()
        assert sample(handle.target, start(model), conds=conds).isfinite().all()
        control["input"][0] = noise(9, 1, 7, WIDTH)
        with pytest.raises(UnsupportedModelError, match="residuals must be of every image token, 144 or 144, got 7"):
            sample(handle.target, start(model), conds=conds)


def test_attention_mask_between_text_and_tokens() -> None:
    model = flux1()
    total = TEXT_TOKENS + NUM_TOKENS
    mask, given = torch.zeros(total, total), condition()
    mask[TEXT_TOKENS + 20 :, :3] = -4.0
    mask[:, TEXT_TOKENS + 70 :] += 0.7

    def velocity(tokens: Tensor, at: Tensor, level: float) -> Tensor:
        rows = torch.cat([torch.arange(TEXT_TOKENS), TEXT_TOKENS + at])
        return model.forward_orig(
            tokens, model.process_img(start(model))[1][:, at], given["context"], torch.zeros(1, TEXT_TOKENS, 3),
            torch.tensor([level]), given["y"], given["guidance"], attn_mask=mask[rows][:, rows],
        )  # fmt: skip

    expected = by_hand(model, start(model), velocity)
    conds = {"positive": [{**given, "attention_mask": mask[None]}]}
    with applied(model, SHORT) as handle:
        assert relative_error(sample(handle.target, start(model), conds=conds), expected) < 1e-5
        with pytest.raises(UnsupportedModelError, match="attn_mask must be of 152 text and image tokens"):
            sample(handle.target, start(model), conds={"positive": [{**given, "attention_mask": mask[None, :7, :7]}]})


def test_inpainting_mask_places_the_anchors_and_keeps_the_rest_of_the_picture() -> None:
    model = flux1()
    mask, latents = torch.zeros(1, 1, *SIZE), noise(4, 1, 4, *SIZE)
    mask[..., 6:16, 4:12] = 1.0
    mask[..., 6:8, 4:12] = 0.3  # soft: painted anew in part
    seen: list[Tensor] = []
    model.inner.x_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with applied(model, SHORT) as handle:
        made = sample(handle.target, start(model), latent_image=latents, denoise_mask=mask)
        anchors = handle.stats().anchors
    outside = (to_tokens(mask, 2) == 0).all(dim=2)[0]
    known = to_tokens(LEVELS[2] * start(model) + (1 - LEVELS[2]) * latents, 2)[0]
    place = {int(token): k for k, token in enumerate(anchors[1][0])}
    kept = [token for token in place if outside[token]]
    assert torch.allclose(seen[2][0][[place[t] for t in kept]], known[kept], atol=1e-5)  # nothing has moved there
    inside = to_tokens(mask, 2).any(dim=2)[0].nonzero().squeeze(1)
    assert set(inside.tolist()) < set(anchors[0][0].tolist()) and anchors[0].shape[1] == 20 + int(0.35 * 124)
    assert torch.allclose(made * (mask == 0), latents * (mask == 0), atol=1e-5)
    assert not torch.allclose(made * mask, latents * mask, atol=0.1)


def test_mask_of_a_fill_model_places_the_anchors() -> None:
    """Beside the state it is shown a masked picture and 8 x 8 mask values of each latent; nobody keeps the rest."""
    model = flux1(extra=5 * CHANNELS)
    shown = torch.cat([noise(4, 1, 4, *SIZE), torch.zeros(1, 16, *SIZE)], dim=1)
    shown[:, 4:, 6:16, 4:12] = 1.0
    given = {**condition(), "c_concat": shown, "model_conds": {"c_concat": SimpleNamespace(cond=shown)}}
    with applied(model, SHORT) as handle:
        made = sample(handle.target, start(model), conds={"positive": [given]})
        anchors = handle.stats().anchors
        still = jitaccel.apply(handle.target, SHORT, micro_flow="none")
        assert not torch.allclose(sample(still.target, start(model), conds={"positive": [given]}), made, atol=1e-3)
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[3:8, 2:6] = True
    assert set(inside.flatten().nonzero().squeeze(1).tolist()) < set(anchors[0][0].tolist())
    assert anchors[0].shape[1] == 20 + int(0.35 * 124)


def test_late_start_places_the_stages_on_the_steps_that_run() -> None:
    model = flux1()
    levels = torch.tensor(jitaccel.noise_levels(SHORT, 10))[-6:]
    with applied(model, SHORT) as handle:
        sample(handle.target, start(model), levels, latent_image=noise(4, 1, 4, *SIZE))
        assert [step.tokens for step in handle.stats().steps] == [50, 50, 93, 144, 144]
        with pytest.raises(ConfigError, match="every stage at least one step, got 2"):
            sample(handle.target, start(model), levels[-3:], latent_image=noise(4, 1, 4, *SIZE))
        sample(handle.target, start(model), torch.linspace(1, 0, 9))
        assert "sampler's 8 steps are followed" in handle.stats().notes[0]


class OtherGuider(CFGGuider):
    def predict_noise(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().predict_noise(*args, **kwargs)


def renormalise(args: Any) -> Tensor:
    return args["denoised"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heun": ({"sampler": KSAMPLER(comfy.sample_heun)}, "the sampler must be 'euler'"),
    "churn": ({"sampler": KSAMPLER(extra_options={"s_churn": 0.5})}, "must add no noise"),
    "guider": ({"guider": OtherGuider}, "the guider must be one of CFGGuider, Guider_DualCFG"),
    "renormalised": ({"sampler_post_cfg_function": [renormalise]}, "sampler_post_cfg_function renormalise"),
    "windows": ({"context_handler": object()}, "context_handler object"),
    "split levels": ({"levels": LEVELS[:-1]}, "sigmas must fall from a level"),
    "goes on": ({"x": torch.zeros(1, 4, *SIZE)}, "must start from new noise"),
    "areas": ({"conds": {"positive": [{**condition(), "area": (8, 8, 0, 0)}]}}, "conditions must be of the whole"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_or_runs_dense_on_request(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    given, message = REFUSED[name]
    model = flux1()
    call = {"x": start(model), **given}
    expected = sample(ModelPatcher(BaseModel(model)), **call)
    with applied(model, SHORT) as handle:
        with pytest.raises(UnsupportedModelError, match=message):
            sample(handle.target, **call)
        assert sample(handle.target, start(model)).isfinite().all()
    with applied(model, SHORT, on_unsupported="dense") as handle:
        with caplog.at_level(logging.WARNING):
            assert torch.equal(sample(handle.target, **call), expected)
        assert message in caplog.text and "ran dense" in handle.stats().notes[0]
        assert sample(handle.target, start(model)).isfinite().all()
        assert len(handle.stats().steps) == 5 and not handle.stats().notes


def test_other_models_and_other_predictions_are_refused() -> None:
    model = flux1()
    base = BaseModel(model)
    patcher = ModelPatcher(base)
    with jitaccel.apply(patcher, SHORT) as handle:
        base.diffusion_model = model.inner
        with pytest.raises(UnsupportedModelError, match=r"must be one of FLUX.1, FLUX.2 and Chroma, got FluxTransf"):
            CFGGuider(handle.target, {"positive": [condition()]}).sample(start(model), KSAMPLER(), LEVELS)
        base.diffusion_model, base.model_sampling = model, object()  # type: ignore[assignment]
        with pytest.raises(UnsupportedModelError, match="must predict velocities"):
            CFGGuider(handle.target, {"positive": [condition()]}).sample(start(model), KSAMPLER(), LEVELS)


def test_an_exception_ends_the_sampling_and_leaves_the_model_whole() -> None:
    model = flux1()

    def interrupt(state: dict[str, Any]) -> None:
        if state["i"] == 2:
            raise InterruptedError

    with applied(model, SHORT) as handle:
        clean = sample(handle.target, start(model))
        with pytest.raises(InterruptedError):
            sample(handle.target, start(model), callback=interrupt)
        assert "forward_orig" not in vars(model)
        assert torch.equal(sample(handle.target, start(model)), clean)


def test_forward_of_another_node_runs_on_the_anchors_and_is_put_back() -> None:
    model = flux1()
    seen = []
    original = model.forward_orig

    def other(img: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(img.shape[1])
        return original(img, *args, **kwargs)

    model.forward_orig = other  # type: ignore[method-assign]
    with applied(model, SHORT) as handle:
        sample(handle.target, start(model))
    assert vars(model)["forward_orig"] is other and seen[0] in (50, NUM_TOKENS)


def test_cache_that_answers_in_place_of_the_model_is_told() -> None:
    model = flux1()
    with applied(model, SHORT) as handle:
        cache = lambda executor, x, *rest, **more: torch.zeros_like(x)  # noqa: E731
        handle.target.wrappers["diffusion_model"] = {"cache": [cache], **handle.target.wrappers["diffusion_model"]}
        with pytest.raises(RuntimeError, match="another node answers"):
            sample(handle.target, start(model))
        ours = handle.target.wrappers["diffusion_model"].pop("jitaccel")  # and a cache that was added after us
        handle.target.wrappers["diffusion_model"] = {"jitaccel": ours, "cache": [cache]}
        with pytest.raises(RuntimeError, match="another node answers"):
            sample(handle.target, start(model))
        assert "forward_orig" not in vars(model)


def test_not_finite_is_told() -> None:
    for step in (0, 4):
        model = flux1()

        def spoil(state: dict[str, Any], step: int = step, model: Any = model) -> None:
            if state["i"] + 1 == step:
                model.inner.proj_out.weight.data.fill_(float("nan"))

        spoil({"i": -1})
        with (
            applied(model, SHORT) as handle,
            pytest.raises(jitaccel.NonFiniteVelocityError, match=f"at step {step}"),
        ):
            sample(handle.target, start(model), callback=spoil)


def test_model_that_is_compiled_whole_gives_the_same_picture() -> None:
    model = flux1()
    with applied(model, SHORT) as handle:
        expected = sample(handle.target, start(model))
        handle.target.model.diffusion_model = torch.compile(model, backend="eager")
        assert relative_error(sample(handle.target, start(model)), expected) < 1e-5


# Nodes


def test_apply_node_patches_a_clone_and_its_clones_take_that_along() -> None:
    model = flux1()
    patcher = ModelPatcher(BaseModel(model))
    plain = sample(patcher, start(model), torch.linspace(1, 0, 12))
    node = NODE_CLASS_MAPPINGS["JiTApply"]
    (clone,) = getattr(node(), node.FUNCTION)(model=patcher, preset="7x", on_unsupported="error")
    later = clone.clone()
    sparse = sample(later, start(model), torch.linspace(1, 0, 12))
    assert not torch.equal(sparse, plain)
    assert torch.equal(sample(patcher, start(model), torch.linspace(1, 0, 12)), plain)
    (again,) = getattr(node(), node.FUNCTION)(model=clone, preset="4x", on_unsupported="error")
    assert len(again.get_wrappers("predict_noise", "jitaccel")) == 1
    assert torch.equal(sample(clone, start(model), torch.linspace(1, 0, 12)), sparse)


def test_applying_again_replaces() -> None:
    patcher = ModelPatcher(BaseModel(flux1()))
    first = jitaccel.apply(patcher, "4x")
    second = jitaccel.apply(patcher, "7x")
    assert not first.is_active and second.is_active
    first.remove()
    assert len(patcher.get_wrappers("predict_noise", "jitaccel")) == 1
    second.remove()
    assert not patcher.get_wrappers("predict_noise", "jitaccel")


def test_sigmas_node_gives_the_presets_levels() -> None:
    node = NODE_CLASS_MAPPINGS["JiTSigmas"]
    make = getattr(node(), node.FUNCTION)
    offered, settings = node.INPUT_TYPES()["required"]["preset"]
    assert offered == ["4x", "7x", "10x", "4x-paper", "7x-paper"] and settings["default"] == "7x"
    for preset in offered:
        expected = torch.tensor(jitaccel.noise_levels(jitaccel.PRESETS[preset]))
        assert torch.equal(make(preset=preset, steps=0, denoise=1.0)[0], expected)
    late = make(preset="7x", steps=6, denoise=0.5)[0]
    assert torch.equal(late, torch.tensor(jitaccel.noise_levels(jitaccel.PRESETS["7x"], 12))[-7:])
    assert make(preset="7x", steps=6, denoise=0.0)[0].numel() == 0


def test_inputs_of_the_nodes_are_their_arguments() -> None:
    for name, node in NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()["required"]
        code = getattr(node, node.FUNCTION).__code__
        assert [*inputs] == [*code.co_varnames[1 : code.co_argcount]]
        assert name in NODE_DISPLAY_NAME_MAPPINGS and len(node.RETURN_TYPES) == len(node.RETURN_NAMES)


def test_folder_linked_into_custom_nodes_loads_as_comfy_loads_it(tmp_path: Path) -> None:
    """By its path and under a name of ComfyUI's, from anywhere."""
    link = tmp_path / "custom_nodes" / "jitaccel"
    link.parent.mkdir()
    link.symlink_to(Path(jitaccel.__file__).parent / "patches" / "comfyui")
    name = str(link).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, link / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    assert module.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS


def test_noise_levels_and_packed_execution_are_told_apart() -> None:
    patcher = ModelPatcher(BaseModel(flux1()))
    with pytest.raises(ConfigError, match="noise_levels must be left out for ComfyUI"):
        jitaccel.apply(patcher, "7x", noise_levels=[1.0, 0.0])
    with pytest.raises(UnsupportedModelError, match="does not know ComfyUI's models"):
        jitaccel.apply(patcher, "7x", compile=True, strict=True)


def test_comfy_without_the_wrappers_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(comfy.WrappersMP, "PREDICT_NOISE")
    with pytest.raises(UnsupportedModelError, match=r"update it to 0\.3\.64 or newer"):
        jitaccel.apply(ModelPatcher(BaseModel(flux1())), "7x")


def test_chroma() -> None:
    params = {"in_dim": 8, "hidden_dim": 16, "n_layers": 2}
    model = comfy.Chroma(chroma_transformer(), patch_size=2, channels=CHANNELS // 4, **params).eval()
    given = {"context": noise(1, 1, TEXT_TOKENS, WIDTH), "guidance": torch.tensor([0.0])}
    ids = model.process_img(start(model))[1]

    def velocity(tokens: Tensor, at: Tensor, level: float) -> Tensor:
        return model.forward_orig(
            tokens, ids[:, at], given["context"], torch.zeros(1, TEXT_TOKENS, 3), torch.tensor([level])
        )

    expected = by_hand(model, start(model), velocity)
    with applied(model, SHORT) as handle:
        assert relative_error(sample(handle.target, start(model), conds={"positive": [given]}), expected) < 1e-5
        cost = chroma_flops(model.inner.config, NUM_TOKENS, TEXT_TOKENS)
        assert handle.stats().dense_step_flops == cost


def test_blocks_that_are_compiled_one_by_one_stay_compiled() -> None:
    model, calls = flux1(), []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    with applied(model, SHORT) as handle:
        expected = sample(handle.target, start(model))
        model.inner.transformer_blocks[0].compile(backend=backend, dynamic=False)
        assert relative_error(sample(handle.target, start(model)), expected) < 1e-5
    assert len(calls) >= 3  # a graph for each stage
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [flux1, flux2], ids=["FLUX.1", "FLUX.2"])
@torch.no_grad()
def test_pooled_stages_are_the_smaller_picture_made_by_hand(make: Any) -> None:
    model = make()
    x, given = start(model), condition(model=model)

    def velocity(tokens: Tensor, grid: tuple[int, int], level: float) -> Tensor:
        small = torch.zeros(1, 1, grid[0] * model.patch_size, grid[1] * model.patch_size)
        return model.forward_orig(
            tokens, model.process_img(small)[1], given["context"], torch.zeros(1, TEXT_TOKENS, model.axes),
            torch.tensor([level]), given.get("y"), given["guidance"],
        )  # fmt: skip

    levels = jitaccel.noise_levels(POOLED)
    state, patch = to_tokens(x, model.patch_size), model.patch_size
    end = denoise_pooled(velocity, lambda y, level: velocity(y, GRID, level), POOLED, state, levels, GRID, patch)
    with applied(model, POOLED) as handle:
        made = sample(handle.target, x, torch.tensor(levels))
    assert relative_error(made, to_picture(end, GRID, patch, x.shape[2:])) < 1e-5
