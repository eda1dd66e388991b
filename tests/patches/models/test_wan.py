"""Wan in its pipelines: whole generations, against the unpatched pipeline and the method by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig, UnsupportedModelError
from jitaccel.patches.layout import patchify, unpatchify
from tests.support import reference, video
from tests.support.tiny import DENSE, SHORT, offload_groups, relative_error
from tests.support.video import GRID, SCHEDULERS, first_input, generate, prompts, wan_on_tokens, wan_pipeline

SCALE, SCALE_2 = 4.0, 2.5
PATCH = (1, 2, 2)
VARIANTS: dict[str, dict[str, Any]] = {
    "one transformer": {},
    "two transformers": {"boundary": 0.8},
    "a timestep for every token": {"expand_timesteps": True},
}


def levels_of(make: Callable[[], Any], config: JiTConfig) -> tuple[tuple[float, ...], list[float]]:
    """Returns the noise levels and the timesteps of a generation, from a scheduler that is not patched."""
    if config.schedule != "native":
        levels = jitaccel.noise_levels(config)
        return levels, [1000 * float(torch.tensor(level)) for level in levels]
    scheduler = make()
    scheduler.set_timesteps(config.steps)
    first, *others = scheduler.sigmas.tolist()
    return (1.0 if first > 0.99999 else first, *others), scheduler.timesteps.tolist()


def by_hand(pipe: Any, config: JiTConfig, make: Callable[[], Any], seed: int = 0) -> Tensor:
    """Returns the latents that the method gives with the layers of a pipeline that is not patched."""
    levels, timesteps = levels_of(make, config)
    text = prompts()

    def velocity(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        time = timesteps[levels.index(level)]
        is_high = pipe.config.boundary_ratio is None or time >= 1000 * pipe.config.boundary_ratio
        model, scale = (pipe.transformer, SCALE) if is_high else (pipe.transformer_2, SCALE_2)
        given = torch.full((1, len(anchors)) if pipe.config.expand_timesteps else (1,), float(time))
        positive, negative = (wan_on_tokens(model, tokens, anchors, GRID, given, each) for each in text.values())
        return negative + scale * (positive - negative)

    noise = torch.randn(1, 4, 3, 12, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        state = reference.denoise(velocity, config, GRID, patchify(noise, PATCH), levels).states[-1]
    return unpatchify(state, GRID, PATCH)


CONFIGS = {
    "few-steps": PRESETS["few-steps"],
    "few-steps, native levels": PRESETS["few-steps"].replace(schedule="native"),
    "7x-paper": PRESETS["7x-paper"].replace(schedule="native"),
    "short": SHORT,
    "short, native levels": SHORT.replace(schedule="native"),
    "own noise": SHORT.replace(noise="own", lifter="clean", schedule="native", solver="dpmpp_2m"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_density_one_is_the_unpatched_pipeline_bit_for_bit(scheduler: str, variant: str) -> None:
    pipe = wan_pipeline(SCHEDULERS[scheduler](), **VARIANTS[variant])
    plain, pair = generate(pipe, 4), generate(pipe, 4, batch=2, guidance_scale=1.0)
    with jitaccel.apply(pipe, DENSE) as handle:
        assert torch.equal(generate(pipe, 4), plain)
        assert torch.equal(generate(pipe, 4, batch=2, guidance_scale=1.0), pair)
        assert handle.stats().dense_steps == 4
    assert torch.equal(generate(pipe, 4), plain)


# Left out: DPM-Solver++ starts below level 1, so that the state is not its own noise; Euler's native levels fall so far
# in one step that the method bounds its extrapolation, which the reference does not.
PAIRS = [
    (scheduler, name)
    for scheduler in SCHEDULERS
    for name in CONFIGS
    if (scheduler, name)
    not in [("DPM-Solver++", "own noise"), ("Euler", "own noise"), ("Euler", "few-steps, native levels")]
]


@pytest.mark.parametrize(("scheduler", "name"), PAIRS)
def test_sparse_generation_is_the_methods(scheduler: str, name: str) -> None:
    pipe, config = wan_pipeline(SCHEDULERS[scheduler]()), CONFIGS[name]
    expected = by_hand(pipe, config, SCHEDULERS[scheduler])
    with jitaccel.apply(pipe, config) as handle:
        assert relative_error(generate(pipe, config.steps), expected) < 1e-5
    stats = handle.stats()
    assert stats.grid == GRID and "grid 3x6x8" in str(stats)
    assert stats.steps[0].tokens == config.token_counts(144)[0]
    assert all(step.calls == 2 for step in stats.steps)


@pytest.mark.parametrize("variant", ["two transformers", "a timestep for every token"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sparse_generation_of_other_kinds_is_the_methods(scheduler: str, variant: str) -> None:
    pipe, config = wan_pipeline(SCHEDULERS[scheduler](), **VARIANTS[variant]), CONFIGS["short, native levels"]
    expected = by_hand(pipe, config, SCHEDULERS[scheduler])
    low = {"guidance_scale_2": SCALE_2} if "boundary" in VARIANTS[variant] else {}
    with jitaccel.apply(pipe, config):
        assert relative_error(generate(pipe, config.steps, **low), expected) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"expand_timesteps": False},
        {"expand_timesteps": True},
        {"expand_timesteps": False, "boundary": 0.8},
        {"expand_timesteps": False, "added_kv_proj_dim": 24, "image_dim": 8},
    ],
    ids=["further channels", "a frame at timestep 0", "two transformers", "image tokens"],
)
def test_image_to_video_is_the_unpatched_one_at_density_one(settings: dict[str, Any]) -> None:
    pipe, call = video.image_pipeline(**settings), {"image": video.image()}
    if "image_dim" in settings:  # the model takes the last 512 tokens for text, and those before for the image's
        text = {name: video.noise(seed, 1, 512, 16) for seed, name in enumerate(prompts())}
        call |= text
        pipe.encode_image = lambda *_: video.noise(3, 1, 5, 8)  # in the place of CLIP, which is not there
    plain = generate(pipe, 4, **call)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(pipe, 4, **call), plain)
    with jitaccel.apply(pipe, SHORT) as handle:
        assert generate(pipe, 5, **call).isfinite().all()
        assert all(step.calls == 2 for step in handle.stats().steps)


def test_image_in_further_channels_goes_with_the_anchors() -> None:
    pipe, config = video.image_pipeline(expand_timesteps=False), CONFIGS["short"]
    given = first_input(pipe)
    _, timesteps = levels_of(video.unipc, config)
    condition = patchify(given[:, 16:], PATCH)

    def model(tokens: Tensor, anchors: Tensor, time: Tensor, text: Tensor) -> Tensor:
        shown = torch.cat([tokens, condition[:, anchors]], dim=2)
        return wan_on_tokens(pipe.transformer, shown, anchors, GRID, time, text)

    state = denoised(model, config, patchify(given[:, :16], PATCH), timesteps)
    with jitaccel.apply(pipe, config):
        assert relative_error(generate(pipe, image=video.image()), unpatchify(state, GRID, PATCH)) < 1e-5


def test_frame_that_is_given_is_shown_whole_in_every_step() -> None:
    pipe, config = video.image_pipeline(expand_timesteps=True), CONFIGS["short"]
    start = patchify(first_input(pipe), PATCH)
    _, timesteps = levels_of(video.unipc, config)
    is_given = torch.arange(144) < 48

    def model(tokens: Tensor, anchors: Tensor, time: Tensor, text: Tensor) -> Tensor:
        at_frame = is_given[anchors][None]
        shown = torch.where(at_frame[..., None], start[:, anchors], tokens)
        return wan_on_tokens(pipe.transformer, shown, anchors, GRID, torch.where(at_frame, 0.0, time), text)

    state = denoised(model, config, start, timesteps, forced=is_given)
    expected = unpatchify(torch.where(is_given[None, :, None], start, state), GRID, PATCH)
    with jitaccel.apply(pipe, config) as handle:
        assert relative_error(generate(pipe, image=video.image()), expected) < 1e-5
    anchors = handle.stats().anchors
    assert all(torch.equal(each[0, :48], torch.arange(48)) for each in anchors)
    assert [each.shape[1] for each in anchors] == [48 + int(share * 96) for share in config.densities]


def test_control_video_goes_with_the_anchors() -> None:
    pipe, config = video.vace_pipeline(), CONFIGS["short"]
    plain = generate(pipe, 4)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(pipe, 4), plain)
    control = patchify(first_input(pipe, "control_hidden_states"), PATCH)
    _, timesteps = levels_of(video.unipc, config)

    def model(tokens: Tensor, anchors: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return wan_on_tokens(pipe.transformer, tokens, anchors, GRID, time, text, control[:, anchors])

    state = denoised(model, config, patchify(first_input(pipe), PATCH), timesteps)
    with jitaccel.apply(pipe, config):
        assert relative_error(generate(pipe), unpatchify(state, GRID, PATCH)) < 1e-5


def denoised(
    model: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    config: JiTConfig,
    start: Tensor,
    timesteps: list[float],
    forced: Tensor | None = None,
) -> Tensor:
    """Returns the last state (1, N, D) of the method by hand with guidance. model: (tokens, anchors, time, text)."""
    levels = jitaccel.noise_levels(config)

    def velocity(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        time = torch.tensor([timesteps[levels.index(level)]])
        positive, negative = (model(tokens, anchors, time, each) for each in prompts().values())
        return negative + SCALE * (positive - negative)

    with torch.no_grad():
        return reference.denoise(velocity, config, GRID, start, levels, forced=forced).states[-1]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_bare_transformer_in_an_euler_loop_is_the_methods(given: bool, batch: int) -> None:
    model, levels = video.wan_transformer(), jitaccel.noise_levels(SHORT)
    noise = torch.cat([video.noise(20 + image, 1, 4, 3, 12, 16) for image in range(batch)])

    def velocity(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        text = prompts()["prompt_embeds"]
        return wan_on_tokens(model, tokens, anchors, GRID, torch.tensor([1000 * level]), text)

    with torch.no_grad():
        states = [reference.denoise(velocity, SHORT, GRID, patchify(each[None], PATCH), levels) for each in noise]
        expected = unpatchify(torch.cat([each.states[-1] for each in states]), GRID, PATCH)
        latents = noise.clone()
        with jitaccel.apply(model, SHORT, noise_levels=levels if given else None) as handle:
            for level, after in itertools.pairwise(levels):
                out = model(
                    hidden_states=latents,
                    timestep=torch.full((batch,), 1000 * level),
                    encoder_hidden_states=prompts()["prompt_embeds"].expand(batch, -1, -1),
                    return_dict=given,
                )
                latents = latents + (after - level) * out[0]
    assert relative_error(latents, expected) < 1e-5
    assert handle.stats().grid == GRID and handle.stats().batch == batch


def test_named_presets_keep_the_models_own_levels() -> None:
    pipe = wan_pipeline()
    assert jitaccel.apply(pipe, "few-steps").config == PRESETS["few-steps"].replace(schedule="native")
    assert jitaccel.apply(pipe, "few-steps", schedule="beta").config == PRESETS["few-steps"]
    assert jitaccel.apply(pipe, PRESETS["few-steps"]).config == PRESETS["few-steps"]
    with pytest.raises(jitaccel.ConfigError, match="noise_levels must be given for a bare transformer"):
        jitaccel.apply(pipe.transformer, "7x")


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_stages_are_replayed_for_other_anchors(variant: str) -> None:
    pipe = wan_pipeline(**VARIANTS[variant])
    with jitaccel.apply(pipe, SHORT):
        eager = [generate(pipe, seed=seed, batch=2) for seed in range(3)]
    with jitaccel.apply(pipe, SHORT, compile={"backend": "eager", "graphs": True}, strict=True) as handle:
        for seed, expected in enumerate(eager):
            assert relative_error(generate(pipe, seed=seed, batch=2), expected) < 1e-6
        compiled = handle.stats().compiled
    assert compiled is not None and compiled.captures == compiled.graphs and compiled.dropped == 0
    assert compiled.replays == 3 * 10 - compiled.captures


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_groups_give_the_same_video(when: str, kind: str) -> None:
    pipe = wan_pipeline()
    with jitaccel.apply(pipe, SHORT):
        expected = generate(pipe)
    if when == "before":
        offload_groups(pipe.transformer, kind)
    with jitaccel.apply(pipe, SHORT):
        if when == "after":
            offload_groups(pipe.transformer, kind)
        assert torch.equal(generate(pipe), expected)


def test_transformer_that_the_user_compiled_stays_compiled() -> None:
    pipe = wan_pipeline()
    with jitaccel.apply(pipe, SHORT):
        expected = generate(pipe)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True, dynamic=False)
    with jitaccel.apply(pipe, SHORT) as handle:
        assert relative_error(generate(pipe), expected) < 1e-6
    assert len(graphs) == 3 and not handle.stats().notes


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_transformer_that_is_compiled_after_apply_runs_eagerly_and_says_so(how: str) -> None:
    pipe = wan_pipeline()
    with jitaccel.apply(pipe, SHORT) as handle:
        expected = generate(pipe)
        if how == "wrapped":
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        else:
            pipe.transformer.compile(backend="eager")
        assert torch.equal(generate(pipe), expected)
        assert "torch.compile was applied after the patch" in handle.stats().notes[-1]


def test_warm_up_makes_videos() -> None:
    pipe = wan_pipeline()
    text = {**prompts(), "num_frames": 9, "prompt": None}
    with jitaccel.apply(pipe, SHORT, compile={"backend": "eager"}) as handle:
        stats = handle.warmup([(96, 128)], progress=False, **text)
        assert stats.grid == GRID and stats.compiled is not None
        graphs = stats.compiled.graphs
        generate(pipe)
        compiled = handle.stats().compiled
    assert compiled is not None and compiled.graphs == graphs == 3


def test_operations_follow_from_the_shapes() -> None:
    pipe = wan_pipeline()
    state = torch.random.get_rng_state()
    with jitaccel.apply(pipe, SHORT) as handle:
        generate(pipe, guidance_scale=1.0)
    stats = handle.stats()
    assert torch.equal(torch.random.get_rng_state(), state)
    width, text, tokens = 24, video.TEXT, stats.steps[0].tokens
    dense = {
        m: 2 * 2 * m * (4 * width**2 + 2 * width**2 + 2 * 32 * width + 2 * (m + text) * width) for m in (tokens, 144)
    }
    ends = {m: 2 * 144 * 16 * width + 2 * m * width * 16 for m in (tokens, 144)}
    both = {m: 2 * 2 * text * 2 * width**2 + dense[m] + ends[m] for m in (tokens, 144)}
    assert stats.dense_step_flops - stats.steps[0].flops == both[144] - both[tokens]


def test_flow_shift_is_kept() -> None:
    config = SHORT.replace(schedule="native")
    pipes = [wan_pipeline(video.unipc(flow_shift=shift)) for shift in (3.0, 7.0)]
    levels = []
    for pipe in pipes:
        with jitaccel.apply(pipe, config) as handle:
            generate(pipe)
            levels.append([step.noise_level for step in handle.stats().steps])
    assert levels[0][0] == levels[1][0] == 1.0
    plain = 1.0 - 1.0 * (1 - 1 / 1000) / 5  # before the shift, after a fifth of the way
    assert [each[1] for each in levels] == pytest.approx([s * plain / (1 + (s - 1) * plain) for s in (3.0, 7.0)])


def test_half_precision_network_leaves_the_latents_float() -> None:
    pipe = wan_pipeline()
    pipe.transformer.to(torch.bfloat16)
    plain = generate(pipe, 4)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(pipe, 4), plain)
    with jitaccel.apply(pipe, SHORT) as handle:
        video_ = generate(pipe)
    assert handle.stats().dense_steps > 0.0
    assert video_.dtype == plain.dtype == torch.float32 and video_.isfinite().all()


def test_scheduler_is_left_as_it_was() -> None:
    pipe = wan_pipeline()
    generate(pipe, 3)
    before = copy.deepcopy(vars(pipe.scheduler))
    with jitaccel.apply(pipe, SHORT):
        generate(pipe)
    after = vars(pipe.scheduler)
    assert before.keys() == after.keys()
    assert all(repr(before[name]) == repr(after[name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type='flow_prediction', got 'epsilon'"),
        ({"use_flow_sigmas": False}, "use_flow_sigmas=True, got False"),
        ({"thresholding": True}, "thresholding=False, got True"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type='zero', got 'sigma_min'"),
    ],
)
@pytest.mark.parametrize("make", [video.unipc, video.dpm])
def test_other_settings_of_multistep_schedulers_are_refused(
    make: Callable[..., Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        jitaccel.apply(wan_pipeline(make(**settings)), SHORT)


def test_other_schedulers_are_refused() -> None:
    import diffusers

    with pytest.raises(UnsupportedModelError, match=r"UniPCMultistepScheduler and DPMSolver.* flow sigmas work too"):
        jitaccel.apply(wan_pipeline(diffusers.EulerDiscreteScheduler()), SHORT)


def test_transformer_set_after_apply_is_an_error() -> None:
    pipe = wan_pipeline(boundary=0.8)
    with jitaccel.apply(pipe, SHORT):
        pipe.transformer_2 = video.wan_transformer(5)
        with pytest.raises(RuntimeError, match=r"pipeline\.transformer_2 must be the patched one"):
            generate(pipe)
