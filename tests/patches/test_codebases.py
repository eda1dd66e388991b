"""Every FLUX transformer and pipeline of diffusers: dense equals unpatched, sparse equals the method by hand."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import PIL.Image
import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, JiTConfig
from jitaccel.patches.flux.kinds import PIPELINES
from tests.support import tiny
from tests.support.models import noise, randomised
from tests.support.pipelines import (
    call_of,
    chroma_pipeline,
    flux2_pipeline,
    flux_pipeline,
    mask_picture,
    picture,
    run_pipeline,
)
from tests.support.reference import denoise
from tests.support.subjects import SUBJECTS, Subject, flux_subject
from tests.support.tiny import CHANNELS, DENSE, GRID, NUM_TOKENS, SHORT, TEXT_TOKENS, WIDTH, relative_error

LEVELS = jitaccel.noise_levels(SHORT)


# Transformers in custom loops


@pytest.mark.parametrize("name", SUBJECTS)
@torch.no_grad()
def test_dense_loop_is_the_models_own(name: str) -> None:
    subject = SUBJECTS[name]()
    expected = subject.loop(tiny.start())
    with jitaccel.apply(subject.model, DENSE, noise_levels=LEVELS):
        assert torch.equal(subject.loop(tiny.start()), expected)


@pytest.mark.parametrize("name", SUBJECTS)
@torch.no_grad()
def test_sparse_loop_is_the_method_written_out_by_hand(name: str) -> None:
    subject = SUBJECTS[name]()
    expected = denoise(subject.velocity, SHORT, GRID, tiny.start(), LEVELS).states[-1]
    with jitaccel.apply(subject.model, SHORT, noise_levels=LEVELS) as handle:
        made = subject.loop(tiny.start())
        assert handle.stats().execution == ("indexed" if name in INDEXED else "packed")
    assert relative_error(made, expected) < 1e-5


INDEXED = ("FLUX.1 ControlNet", "FLUX.2", "FLUX.2 references", "Chroma")


@pytest.mark.parametrize("execution", ["indexed", "auto"])
@pytest.mark.parametrize("name", SUBJECTS)
@torch.no_grad()
def test_each_image_of_a_batch_is_the_one_made_alone(name: str, execution: Any) -> None:
    subject = SUBJECTS[name]()
    with jitaccel.apply(subject.model, SHORT, noise_levels=LEVELS, execution=execution):
        alone = [subject.loop(tiny.start(seed)) for seed in (1, 2)]
        together = subject.loop(torch.cat([tiny.start(1), tiny.start(2)]), batch=2)
    assert relative_error(together, torch.cat(alone)) < 1e-5


@pytest.mark.parametrize("name", ["FLUX.1 Kontext", "FLUX.1 Control"])
@torch.no_grad()
def test_what_is_shown_beside_the_state_goes_into_a_compiled_stage(name: str) -> None:
    subject = SUBJECTS[name]()
    expected = denoise(subject.velocity, SHORT, GRID, tiny.start(), LEVELS).states[-1]
    options = {"backend": "eager", "graphs": True}
    with jitaccel.apply(subject.model, SHORT, noise_levels=LEVELS, compile=options, strict=True):
        for _ in range(2):
            assert relative_error(subject.loop(tiny.start()), expected) < 1e-5


@pytest.mark.parametrize("name", ["FLUX.2", "Chroma"])
def test_packed_execution_says_that_it_does_not_know_a_model(name: str) -> None:
    subject = SUBJECTS[name]()
    with pytest.raises(jitaccel.UnsupportedModelError, match="packed execution does not support"):
        jitaccel.apply(subject.model, SHORT, execution="packed", strict=True)
    with jitaccel.apply(subject.model, SHORT, execution="packed") as handle:
        assert "does not support" in handle.stats().notes[-1]


@torch.no_grad()
def test_fill_model_paints_its_mask_from_the_first_stage_on() -> None:
    """Six times as many channels in as out: a masked picture, and a mask in the last of them."""
    extra = noise(4, NUM_TOKENS, 5 * CHANNELS)
    mask = torch.zeros(GRID, dtype=torch.bool)
    mask[3:8, 2:6] = True
    extra[:, CHANNELS:] = mask.flatten()[:, None].float()
    model = tiny.transformer(in_channels=6 * CHANNELS, out_channels=CHANNELS)
    subject = flux_subject(model=model, extra=extra)
    with jitaccel.apply(model, SHORT, noise_levels=LEVELS) as handle:
        subject.loop(tiny.start())
        stats = handle.stats()
    expected = [20 + int(density * (NUM_TOKENS - 20)) for density in (0.35, 0.65, 1.0)]
    assert [anchors.shape[1] for anchors in stats.anchors] == expected
    inside = set(mask.flatten().nonzero().squeeze(1).tolist())
    assert inside <= set(stats.anchors[0][0].tolist())


@torch.no_grad()
def test_nunchaku_gets_numbers_of_anchors_that_its_kernels_pad_to() -> None:
    """A class of its name: the package itself needs a GPU."""

    class NunchakuFluxTransformer2dModel(diffusers.FluxTransformer2DModel):  # type: ignore[misc]
        pass

    model = randomised(NunchakuFluxTransformer2dModel.from_config(tiny.transformer().config))
    levels, state = jitaccel.noise_levels(SHORT), tiny.start(grid=(24, 30))
    subject = flux_subject(model=model)
    with jitaccel.apply(model, SHORT, noise_levels=levels, execution="indexed") as handle:
        for level, after in itertools.pairwise(levels):
            velocity = model(
                state,
                img_ids=tiny.ids((24, 30)),
                timestep=torch.tensor([level]),
                return_dict=False,
                **subject.arguments,
            )[0]
            state = state + (after - level) * velocity
        assert [anchors.shape[1] for anchors in handle.stats().anchors] == [256, 512, 720]


# Pipelines


FLUX_PIPELINES, CHROMA_PIPELINES = (
    [name for name in PIPELINES[model] if hasattr(diffusers, name)]
    for model in ("FluxTransformer2DModel", "ChromaTransformer2DModel")
)


@pytest.mark.parametrize("name", FLUX_PIPELINES)
def test_dense_pipeline_is_the_untouched_one(name: str) -> None:
    pipe = flux_pipeline(name)
    expected = run_pipeline(pipe)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(run_pipeline(pipe), expected)
    assert torch.equal(run_pipeline(pipe), expected)


@pytest.mark.parametrize("name", FLUX_PIPELINES)
def test_sparse_pipeline_computes_fewer_tokens_on_the_steps_that_run(name: str) -> None:
    pipe = flux_pipeline(name)
    config = SHORT.replace(steps=8, schedule="native")
    with jitaccel.apply(pipe, config) as handle, tiny.counted(pipe.transformer) as seen:
        made = run_pipeline(pipe)
        stats = handle.stats()
    assert made.isfinite().all()
    starts_late = "strength" in call_of(name)
    steps = 6 if starts_late else 8  # 0.7 of 8 steps is 5.6, from step 2 on
    ends = config.stage_ends(steps)
    masked = 20 if "Inpaint" in name or "Fill" in name else 0
    counts = [masked + int(d * (NUM_TOKENS - masked)) for d in config.densities]
    if masked and name != "FluxFillPipeline":  # the mask is blurred to tokens by interpolation
        counts = [anchors.shape[1] for anchors in stats.anchors]
        assert counts[0] > config.token_counts(NUM_TOKENS)[0]
    expected = [counts[sum(step >= end for end in ends)] for step in range(steps)]
    assert [step.tokens for step in stats.steps] == expected
    references = seen[0] - expected[0]
    assert references >= 0 and (references > 0) == ("Kontext" in name)
    assert seen == [count + references for count in expected]


MASKED = [name for name in FLUX_PIPELINES if hasattr(getattr(diffusers, name), "prepare_mask_latents")]


@pytest.mark.parametrize("derived", [False, True], ids=["diffusers' own", "derived, of another name"])
@pytest.mark.parametrize("name", MASKED)
def test_mask_places_the_anchors(name: str, derived: bool) -> None:
    """Recognised by the mask that a pipeline prepares, not by the name of its class."""
    pipe = flux_pipeline(name)
    call = call_of(name)
    if derived:
        pipe.__class__ = type("Repaint", (type(pipe),), {})
    with jitaccel.apply(pipe, SHORT.replace(steps=8, schedule="native")) as handle:
        pipe(**call, generator=torch.Generator().manual_seed(0))
        first = set(handle.stats().anchors[0][0].tolist())
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[3:8, 2:6] = True
    assert set(inside.flatten().nonzero().squeeze(1).tolist()) <= first < set(range(NUM_TOKENS))
    assert "prepare_mask_latents" not in vars(pipe)


def test_mask_of_everything_makes_every_stage_dense() -> None:
    pipe = flux_pipeline("FluxFillPipeline")
    with jitaccel.apply(pipe, SHORT) as handle:
        run_pipeline(pipe, mask_image=torch.ones_like(mask_picture()))
        assert [step.tokens for step in handle.stats().steps] == [NUM_TOKENS] * 5


def test_strength_that_leaves_too_few_steps_says_how_many_are_needed() -> None:
    pipe = flux_pipeline("FluxImg2ImgPipeline")
    with jitaccel.apply(pipe, SHORT), pytest.raises(ConfigError, match=r"a step for every stage, got 2 of 5.*steps=7"):
        run_pipeline(pipe, strength=0.3)


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "FluxImg2ImgPipeline", "FluxControlNetPipeline"])
def test_guided_branches_share_their_anchors(name: str) -> None:
    pipe = flux_pipeline(name)
    guided = {"negative_prompt": "green", "true_cfg_scale": 2.0}
    config = SHORT.replace(steps=8)
    with jitaccel.apply(pipe, config, execution="indexed") as handle:
        indexed = run_pipeline(pipe, **guided)
        assert {step.calls for step in handle.stats().steps} == {2}
    with jitaccel.apply(pipe, config):
        assert relative_error(run_pipeline(pipe, **guided), indexed) < 1e-5


def test_pipeline_route_and_bare_route_agree_on_references() -> None:
    """The same model, noise and levels: once through Kontext's pipeline, once in a loop of one's own."""
    pipe = flux_pipeline("FluxKontextPipeline")
    seen: dict[str, Any] = {}

    def remember(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.setdefault("call", {**kwargs})

    hook = pipe.transformer.register_forward_pre_hook(remember, with_kwargs=True)
    with jitaccel.apply(pipe, SHORT):
        expected = run_pipeline(pipe)
    hook.remove()
    call = seen["call"]
    hidden, ids = call.pop("hidden_states"), call.pop("img_ids")
    for name in ("timestep", "return_dict", "joint_attention_kwargs"):
        call.pop(name)
    subject = Subject(
        model=pipe.transformer, arguments=call, ids=ids[:NUM_TOKENS],
        references=hidden[0, NUM_TOKENS:], reference_ids=ids[NUM_TOKENS:],
    )  # fmt: skip
    with jitaccel.apply(pipe.transformer, SHORT, noise_levels=LEVELS), torch.no_grad():
        assert relative_error(subject.loop(hidden[:, :NUM_TOKENS]), expected) < 1e-4


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("Flux2Pipeline", {}),
        ("Flux2KleinPipeline", {"guidance_scale": 1.0}),
        ("Flux2KleinPipeline", {"guidance_scale": 3.0, "negative_prompt_embeds": noise(2, 1, TEXT_TOKENS, WIDTH)}),
    ],
    ids=["dev", "klein", "klein guided"],
)
def test_flux2_pipelines(name: str, call: dict[str, Any]) -> None:
    if not hasattr(diffusers, name):
        pytest.skip("this diffusers has no such pipeline")
    pipe = flux2_pipeline(name)

    def make() -> Tensor:
        return pipe(
            prompt_embeds=noise(1, 1, TEXT_TOKENS, WIDTH), height=4 * GRID[0], width=4 * GRID[1],
            num_inference_steps=5, output_type="latent", generator=torch.Generator().manual_seed(0), return_dict=False,
            **call,
        )[0]  # fmt: skip

    expected = make()
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(make(), expected)
    with jitaccel.apply(pipe, SHORT) as handle:
        assert make().isfinite().all()
        stats = handle.stats()
    assert [step.tokens for step in stats.steps] == [50, 50, 93, 144, 144]
    assert {step.calls for step in stats.steps} == {2 if "negative_prompt_embeds" in call else 1}


@pytest.mark.skipif(not hasattr(diffusers, "Flux2KleinInpaintPipeline"), reason="this diffusers has no such pipeline")
def test_flux2_inpainting_starts_late_and_places_its_anchors() -> None:
    pipe = flux2_pipeline("Flux2KleinInpaintPipeline")

    def make() -> Tensor:
        return pipe(
            image=picture(1), mask_image=mask_picture(), strength=0.7, prompt_embeds=noise(1, 1, TEXT_TOKENS, WIDTH),
            guidance_scale=1.0, height=4 * GRID[0], width=4 * GRID[1], num_inference_steps=8, output_type="latent",
            generator=torch.Generator().manual_seed(0), return_dict=False,
        )[0]  # fmt: skip

    expected = make()
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(make(), expected)
    with jitaccel.apply(pipe, SHORT.replace(steps=8)) as handle:
        assert make().isfinite().all()
        stats = handle.stats()
    assert len(stats.steps) == 6 and stats.steps[0].tokens == stats.anchors[0].shape[1] > 50
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[3:8, 2:6] = True
    assert set(inside.flatten().nonzero().squeeze(1).tolist()) <= set(stats.anchors[0][0].tolist())


def test_references_of_flux2_are_told_apart_once_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipelines make new position ids at each step, and reading them waits for the device."""
    from jitaccel.patches.flux import arguments

    looks: list[int] = []
    picture = PIL.Image.new("RGB", (64, 64), "red")
    original = arguments.num_generated
    monkeypatch.setattr(arguments, "num_generated", lambda ids: looks.append(1) or original(ids))
    pipe = flux2_pipeline("Flux2KleinPipeline" if hasattr(diffusers, "Flux2KleinPipeline") else "Flux2Pipeline")
    guidance = {} if type(pipe).__name__ == "Flux2Pipeline" else {"guidance_scale": 1.0}

    def make() -> None:
        pipe(
            image=[picture], prompt_embeds=noise(1, 1, TEXT_TOKENS, WIDTH), height=4 * GRID[0], width=4 * GRID[1],
            num_inference_steps=5, output_type="latent", generator=torch.Generator().manual_seed(0), **guidance,
        )  # fmt: skip

    with jitaccel.apply(pipe, SHORT) as handle, tiny.counted(pipe.transformer) as seen:
        for generation in (1, 2):
            make()
            assert len(looks) == generation
    references = seen[0] - 50
    assert references > 0 and seen == [n + references for n in (50, 50, 93, 144, 144)] * 2
    assert handle.stats().generations == 2


@pytest.mark.parametrize("name", CHROMA_PIPELINES)
def test_chroma_pipelines(name: str) -> None:
    pipe = chroma_pipeline(name)
    mask = torch.ones(1, TEXT_TOKENS)
    mask[:, 5:] = 0.0
    call: dict[str, Any] = {
        "prompt_embeds": noise(1, 1, TEXT_TOKENS, WIDTH), "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(2, 1, TEXT_TOKENS, WIDTH), "negative_prompt_attention_mask": mask,
        "height": 4 * GRID[0], "width": 4 * GRID[1], "num_inference_steps": 8, "output_type": "latent",
        "return_dict": False,
    }  # fmt: skip
    if name != "ChromaPipeline":
        call |= {"image": picture(1), "strength": 0.7}
    if "Inpaint" in name:
        if not hasattr(pipe.transformer.config, "guidance_embeds"):
            pytest.skip("this diffusers' own pipeline asks its transformer for a setting that it has not")
        call["mask_image"] = mask_picture()

    def make() -> Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0))[0]

    expected = make()
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(make(), expected)
    with jitaccel.apply(pipe, SHORT.replace(steps=8)) as handle:
        assert make().isfinite().all()
        stats = handle.stats()
    assert len(stats.steps) == (8 if name == "ChromaPipeline" else 6)
    assert (stats.steps[0].tokens == 50) == ("Inpaint" not in name) and stats.steps[-1].tokens == NUM_TOKENS


def test_names_of_pipelines_are_those_of_diffusers() -> None:
    """At the newest version that the tests know; an older one lacks some."""
    missing = [name for names in PIPELINES.values() for name in names if not hasattr(diffusers, name)]
    assert not missing or diffusers.__version__ < "0.42"


def test_caller_may_set_the_steps_of_a_pipeline_that_starts_late() -> None:
    pipe = flux_pipeline("FluxImg2ImgPipeline")
    config = JiTConfig(densities=(0.5, 1.0), boundaries=(0.5, 1.0), steps="caller", schedule="native")
    with jitaccel.apply(pipe, config) as handle:
        run_pipeline(pipe, num_inference_steps=10)
        assert [step.tokens for step in handle.stats().steps] == [72] * 3 + [144] * 4
