"""`jitaccel.apply` on a bare transformer: a plain Euler loop, which knows nothing of jitaccel, gets the same images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, ConfigError, JiTConfig, noise_levels
from jitaccel.method.steps import Step
from jitaccel.patches.loops.visits import _step_made, _Visit
from tests.support import reference, tiny
from tests.support.tiny import GRID, SHORT, generate, relative_error

SCALE = 3.0
LEVELS = {name: noise_levels(config) for name, config in PRESETS.items() if name != "dense"}
UNIFORM = tuple(1.0 - i / 16 for i in range(17))
GEOMETRIC = (*(0.85**i for i in range(24)), 0.0)
SHIFTED = tuple(3.0 * s / (1.0 + 2.0 * s) for s in (1.0 - i / 28 for i in range(29)))
CLEAN = SHORT.replace(lifter="clean", micro_flow="none")
EXACT = PRESETS["7x-paper"].replace(micro_flow="exact")


class Loop:
    """Somebody's sampler: the network, the texts, and an Euler step."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.pipe = tiny.pipeline()
        encode = self.pipe.encode_prompt
        texts = [encode(text, None, max_sequence_length=tiny.TEXT_TOKENS) for text in ("a red circle", "blue square")]
        self.model, self.dtype = self.pipe.transformer, dtype
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.texts = [tuple(part.to(dtype) for part in text) for text in texts]

    def velocity(self, state: Tensor, level: float, text: int | str = 0, grid: tuple[int, int] = GRID) -> Tensor:
        """`text`: of the prompt (0), of the negative prompt (1), or "both" for a batch of [neg, pos]."""
        embeds, pooled, text_ids = self.texts[text if isinstance(text, int) else 0]
        if text == "both":
            embeds, pooled = (torch.cat([self.texts[1][part], self.texts[0][part]]) for part in (0, 1))
        batch = state.shape[0]
        with torch.no_grad():
            velocity: Tensor = self.model(
                hidden_states=state,
                encoder_hidden_states=embeds.expand(batch, -1, -1),
                pooled_projections=pooled.expand(batch, -1),
                timestep=(torch.tensor([level * 1000.0]).to(self.dtype) / 1000).expand(batch),
                img_ids=tiny.ids(grid).to(self.dtype),
                txt_ids=text_ids,
                guidance=torch.full([batch], 3.5),
                return_dict=False,
            )[0]
        return velocity

    def guided(self, state: Tensor, level: float, order: str) -> Tensor:
        """`order`: of the branches of classifier-free guidance; "none" for no guidance."""
        if order == "none":
            return self.velocity(state, level)
        if order == "batch":
            negative, positive = self.velocity(torch.cat([state, state]), level, "both").chunk(2)
        elif order == "positive first":
            positive, negative = self.velocity(state, level, 0), self.velocity(state, level, 1)
        else:
            negative, positive = self.velocity(state, level, 1), self.velocity(state, level, 0)
        return negative + SCALE * (positive - negative)

    def run(
        self,
        levels: Sequence[float],
        state: Tensor,
        order: str = "none",
        steps: int | None = None,
        in_place: bool = False,
    ) -> list[Tensor]:
        """Returns the state after each of the first `steps` steps."""
        state = state.to(self.dtype)
        if in_place:
            state = state.clone()
        states = []
        for level, next_level in list(pairwise(levels))[:steps]:
            velocity = self.guided(state, level, order)
            if in_place:
                state.add_(velocity, alpha=next_level - level)
            else:
                state = (state.float() + (next_level - level) * velocity.float()).to(self.dtype)
            states.append(state.clone())
        return states


@pytest.fixture
def loop() -> Loop:
    return Loop()


def through_pipeline(config: JiTConfig | str, seed: int = 0, dtype: torch.dtype = torch.float32, **call: Any) -> Tensor:
    """Returns what the pipeline route makes of the same start."""
    loop = Loop(dtype)
    embeds, pooled, _ = loop.texts[0]
    if call:
        call = {**call, "negative_prompt_embeds": loop.texts[1][0], "negative_pooled_prompt_embeds": loop.texts[1][1]}
    start = tiny.start(seed).to(dtype)
    with jitaccel.apply(loop.pipe, config):
        return generate(
            loop.pipe, prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, latents=start, **call
        )


def network_of(loop: Loop) -> reference.Velocity:
    """Returns the unpatched network as the reference calls it."""
    embeds, pooled, text_ids = loop.texts[0]

    def run(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        with torch.no_grad():
            velocity: Tensor = loop.model(
                hidden_states=tokens,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=torch.tensor([level * 1000.0]) / 1000,
                img_ids=tiny.ids()[anchors],
                txt_ids=text_ids,
                guidance=torch.tensor([3.5]),
                return_dict=False,
            )[0]
        return velocity

    return run


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
@pytest.mark.parametrize(
    "config",
    [
        PRESETS["7x"],
        PRESETS["4x"],
        PRESETS["7x-paper"],
        PRESETS["4x-paper"],
        EXACT,
        SHORT.replace(noise="own", lifter="clean"),
        SHORT.replace(micro_flow="none"),
        CLEAN,
    ],
    ids=["7x", "4x", "7x-paper", "4x-paper", "exact", "own-clean", "none", "clean-none"],
)
def test_loop_makes_the_pipelines_image(loop: Loop, config: JiTConfig, given: bool) -> None:
    levels = noise_levels(config)
    with jitaccel.apply(loop.model, config, noise_levels=levels if given else None) as handle:
        state = loop.run(levels, tiny.start())[-1]
        assert relative_error(state, through_pipeline(config)) < 1e-5
    counts = config.token_counts(tiny.NUM_TOKENS)
    stages = [config.stage_of_step(i, len(levels) - 1) for i in range(len(levels) - 1)]
    assert [step.tokens for step in handle.stats().steps] == [counts[stage] for stage in stages]
    assert handle.stats().generations == 1


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
@pytest.mark.parametrize("preset", ["7x", "4x", "7x-paper", "4x-paper"])
def test_loop_in_bfloat16_makes_the_pipelines_image_to_rounding(preset: str, given: bool) -> None:
    levels, loop = LEVELS[preset], Loop(torch.bfloat16)
    dense = loop.run(levels, tiny.start())[-1]
    with jitaccel.apply(loop.model, preset, noise_levels=levels if given else None) as handle:
        state = loop.run(levels, tiny.start())[-1]
    target = through_pipeline(preset, dtype=torch.bfloat16)
    far = float((dense.float() - target.float()).abs().mean())
    assert float((state.float() - target.float()).abs().mean()) < 0.25 * far
    assert [step.stage for step in handle.stats().steps] == [
        PRESETS[preset].stage_of_step(i, len(levels) - 1) for i in range(len(levels) - 1)
    ]


@pytest.mark.parametrize("order", ["none", "positive first", "batch"])
def test_loop_that_writes_in_place_makes_the_same_image(loop: Loop, order: str) -> None:
    config = EXACT.replace(noise="own")
    levels = noise_levels(config)
    with jitaccel.apply(loop.model, config):
        plain = loop.run(levels, tiny.start(), order)[-1]
        assert relative_error(loop.run(levels, tiny.start(), order, in_place=True)[-1], plain) < 1e-4


def test_nobodys_tensor_is_written(loop: Loop) -> None:
    levels = noise_levels(EXACT)
    state = tiny.start()
    with jitaccel.apply(loop.model, EXACT):
        for level, next_level in pairwise(levels):
            copy = state.clone()
            velocity = loop.velocity(state, level)
            assert torch.equal(state, copy)
            kept = velocity.clone()
            loop.velocity(state, level, 1)
            assert torch.equal(velocity, kept)
            state = state + (next_level - level) * velocity


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
@pytest.mark.parametrize("order", ["positive first", "negative first", "batch"])
@pytest.mark.parametrize(
    "config",
    [EXACT, SHORT, CLEAN, PRESETS["7x"], EXACT.replace(solver="dpmpp_2m")],
    ids=["7x-paper", "stage of one step", "clean, none", "7x", "solver and moves"],
)
def test_guided_loop_makes_the_guided_pipelines_image(loop: Loop, config: JiTConfig, order: str, given: bool) -> None:
    levels = noise_levels(config)
    target = through_pipeline(config, true_cfg_scale=SCALE)
    with jitaccel.apply(loop.model, config, noise_levels=levels if given else None) as handle:
        assert relative_error(loop.run(levels, tiny.start(), order)[-1], target) < 1e-4
    calls, batch = (1, 2) if order == "batch" else (2, 1)
    assert {step.calls for step in handle.stats().steps} == {calls} and handle.stats().batch == batch


def test_batched_and_sequential_guidance_make_the_same_image(loop: Loop) -> None:
    levels = noise_levels(EXACT)
    images = []
    for order in ("batch", "positive first", "negative first"):
        with jitaccel.apply(loop.model, EXACT):
            images.append(loop.run(levels, tiny.start(), order)[-1])
    assert relative_error(images[1], images[0]) < 1e-4
    assert relative_error(images[2], images[0]) < 1e-4


def test_image_of_a_batch_is_the_image_alone(loop: Loop) -> None:
    levels = noise_levels(EXACT)
    start = torch.cat([tiny.start(1), tiny.start(2)])
    with jitaccel.apply(loop.model, EXACT):
        together = loop.run(levels, start)[-1]
        for image in range(2):
            alone = loop.run(levels, start[image : image + 1])[-1]
            torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-5, atol=1e-5)


def test_arguments_of_one_row_serve_the_whole_batch(loop: Loop) -> None:
    state = torch.cat([tiny.start(1), tiny.start(2)])
    embeds, pooled, text_ids = loop.texts[0]
    arguments = (state, embeds.expand(2, -1, -1), pooled.expand(2, -1))
    with jitaccel.apply(loop.model, EXACT), torch.no_grad():
        expected = loop.velocity(state, 1.0)
    with jitaccel.apply(loop.model, EXACT), torch.no_grad():
        velocity = loop.model(*arguments, torch.ones(1), tiny.ids(), text_ids, torch.tensor([3.5])).sample
    torch.testing.assert_close(velocity, expected)


# Levels that nobody told


@pytest.mark.parametrize("levels", [UNIFORM, GEOMETRIC, SHIFTED], ids=["uniform", "geometric", "shifted"])
def test_owed_move_vanishes_on_levels_that_were_predicted_wrong(loop: Loop, levels: tuple[float, ...]) -> None:
    with jitaccel.apply(loop.model, EXACT) as handle:
        states = loop.run(levels, tiny.start())
        steps = handle.stats().steps
        assert handle.stats().generations == 1
    stages = [step.stage for step in steps]
    assert set(stages) == {0, 1, 2}
    exact = reference.denoise(network_of(loop), EXACT, GRID, tiny.start(), levels, stages=stages)
    errors = [relative_error(*pair) for pair in zip(states, exact.states, strict=True)]
    # The reference moves the state after the step before, the loop within the first step of the stage.
    boundaries = [i for i in range(1, len(stages)) if stages[i] > stages[i - 1]]
    assert max(errors[: boundaries[0] - 1], default=0.0) < 1e-5
    for start, end in pairwise((*boundaries, len(stages) + 1)):
        assert errors[start - 1] > 0.1
        for i in range(start, end - 1):
            made, guessed = levels[i] - levels[i + 1], steps[i].noise_level - steps[i].next_level
            assert errors[i] < 1.5 * abs(1.0 - made / guessed) * errors[i - 1] + 1e-5
    assert errors[-1] < 1e-5


@pytest.mark.parametrize("in_place", [False, True], ids=["new states", "in place"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loop_in_half_precision_needs_not_tell_its_levels(dtype: torch.dtype, in_place: bool) -> None:
    loop, start = Loop(dtype), torch.cat([tiny.start(1), tiny.start(2)])
    with jitaccel.apply(loop.model, EXACT) as handle:
        untold = loop.run(SHIFTED, start, in_place=in_place)[-1]
        stages = [step.stage for step in handle.stats().steps]
    ends = tuple(sum(stage <= last for stage in stages) / len(stages) for last in range(EXACT.num_stages))
    same_stages = EXACT.replace(boundaries=ends, steps=len(stages))
    with jitaccel.apply(loop.model, same_stages, noise_levels=SHIFTED) as handle:
        told = loop.run(SHIFTED, start, in_place=in_place)[-1]
        assert [step.stage for step in handle.stats().steps] == stages
    error = torch.linalg.vector_norm(untold.float() - told.float()) / torch.linalg.vector_norm(told.float())
    assert error < 2 * torch.finfo(dtype).eps


PAINTED = (torch.arange(tiny.NUM_TOKENS) < tiny.NUM_TOKENS // 20)[:, None]
EDITS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda state, level: state,
    "inpainting": lambda state, level: torch.where(
        PAINTED, (1 - level) * tiny.start(8) + level * tiny.start(0), state.float()
    ),
    "inpainting with fresh noise": lambda state, level: torch.where(
        PAINTED, (1 - level) * tiny.start(8) + level * tiny.start(int(1000 * level)), state.float()
    ),
    "scaling": lambda state, level: 0.99 * state.float(),
}


@pytest.mark.parametrize(
    ("dtype", "order", "edit", "is_fitted"),
    [
        (torch.bfloat16, "none", "none", True),
        (torch.float32, "none", "none", False),
        (torch.bfloat16, "positive first", "none", False),
        (torch.bfloat16, "batch", "none", False),
        *((torch.bfloat16, "none", edit, False) for edit in EDITS if edit != "none"),
    ],
)
def test_step_is_fitted_to_no_state_that_guidance_or_an_edit_made(
    dtype: torch.dtype, order: str, edit: str, is_fitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(dtype)
    loop.texts[1] = loop.texts[0]  # branches so alike that what they get does not tell of guidance

    def image() -> Tensor:
        state = tiny.start(0).to(dtype)
        with jitaccel.apply(loop.model, EXACT) as handle:
            for level, next_level in pairwise(SHIFTED):
                velocity = loop.guided(state, level, order)
                state = (state.float() + (next_level - level) * velocity.float()).to(dtype)
                state = EDITS[edit](state, next_level).to(dtype)
            assert handle.stats().generations == 1
        return state

    fitted = image()
    monkeypatch.setattr("jitaccel.patches.loops.visits._step_made", lambda visit, state, rounded: rounded)
    assert torch.equal(fitted, image()) is not is_fitted


@pytest.mark.parametrize(("off", "is_fitted"), [(0.007, True), (0.009, False)])
def test_step_is_fitted_as_far_as_levels_are_rounded(off: float, is_fitted: bool) -> None:
    seen, velocity, length = tiny.start(1).bfloat16(), tiny.start(2), -0.04
    step = Step(index=3, stage=1, noise_level=0.5, next_level=0.45, may_end_stage=True)
    visit = _Visit(step=step, level=0.5, seen=seen, entered=seen, calls=1, returned=velocity)
    state = (seen.float() + length * velocity).bfloat16()
    assert _step_made(visit, state, length + off) == pytest.approx(length + (0.0 if is_fitted else off), abs=2e-4)


def test_given_levels_of_another_schedule_make_the_references_image(loop: Loop) -> None:
    with jitaccel.apply(loop.model, EXACT, noise_levels=SHIFTED):
        states = loop.run(SHIFTED, tiny.start())
    exact = reference.denoise(network_of(loop), EXACT, GRID, tiny.start(), SHIFTED)
    assert relative_error(states[-1], exact.states[-1]) < 1e-5


def test_given_levels_allow_native_schedules_and_callers_steps(loop: Loop) -> None:
    config = EXACT.replace(schedule="native", steps="caller")
    with jitaccel.apply(loop.model, config, noise_levels=UNIFORM):
        states = loop.run(UNIFORM, tiny.start())
    exact = reference.denoise(network_of(loop), config, GRID, tiny.start(), UNIFORM)
    assert relative_error(states[-1], exact.states[-1]) < 1e-5


def test_notes_say_what_the_levels_are(loop: Loop) -> None:
    with jitaccel.apply(loop.model, "7x-paper") as handle:
        assert "predicted" in handle.stats().notes[0]
    with jitaccel.apply(loop.model, "7x-paper", noise_levels=LEVELS["7x-paper"]) as handle:
        assert handle.stats().notes == ()
    with jitaccel.apply(loop.model, "7x-paper", noise_levels=UNIFORM) as handle:
        assert "16 steps" in handle.stats().notes[0] and "11" in handle.stats().notes[0]


# Where a generation starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_new_generation_is_told_from_the_last(given: bool, dtype: torch.dtype) -> None:
    levels, loop = LEVELS["4x-paper"], Loop(dtype)  # bfloat16 makes 1.0 of the first two of these
    noise = [tiny.start(seed, (6, 6)) for seed in (1, 2)]
    loop.velocity = _on_small_grid(loop.velocity)  # type: ignore[method-assign]

    def fresh(seed: int) -> Tensor:
        with jitaccel.apply(loop.model, "4x-paper", noise_levels=levels if given else None):
            return loop.run(levels, noise[seed])[-1]

    images = [fresh(0), fresh(1)]
    with jitaccel.apply(loop.model, "4x-paper", noise_levels=levels if given else None) as handle:
        for seed in (0, 1, 1):
            assert torch.equal(loop.run(levels, noise[seed])[-1], images[seed])
        assert handle.stats().generations == 3
        for aborted_after, seed in ((1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (16, 1)):
            loop.run(levels, noise[0], steps=aborted_after)
            assert torch.equal(loop.run(levels, noise[seed])[-1], images[seed]), (aborted_after, seed)


def _on_small_grid(velocity: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: velocity(*args, grid=(6, 6))


def test_generation_after_an_exception_is_clean(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    with jitaccel.apply(loop.model, SHORT):
        clean = loop.run(levels, tiny.start())[-1]
        for step in range(4):
            loop.run(levels, tiny.start(), steps=step)
            hook = loop.model.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loop.velocity(tiny.start(5), 1.0)
            hook.remove()
            assert torch.equal(loop.run(levels, tiny.start())[-1], clean)


def test_reset_forgets_an_unfinished_generation(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    with jitaccel.apply(loop.model, SHORT) as handle:
        clean = loop.run(levels, tiny.start())[-1]
        loop.run(levels, tiny.start(), steps=3)
        handle.reset()
        assert torch.equal(loop.run(levels, tiny.start())[-1], clean)


def test_shape_may_change_between_generations(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    with jitaccel.apply(loop.model, SHORT) as handle:
        one = loop.run(levels, tiny.start())[-1]
        two = loop.run(levels, torch.cat([tiny.start(), tiny.start(4)]))[-1]
        torch.testing.assert_close(two[:1], one, rtol=1e-5, atol=1e-5)
        assert torch.equal(loop.run(levels, tiny.start())[-1], one)
        assert handle.stats().generations == 3


def test_loop_with_more_steps_than_predicted_stays_one_generation(loop: Loop) -> None:
    levels = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0)  # the step after .2 is predicted to end at 0
    with jitaccel.apply(loop.model, EXACT) as handle:
        assert loop.run(levels, tiny.start())[-1].isfinite().all()
    assert handle.stats().generations == 1 and len(handle.stats().steps) == 8


@pytest.mark.parametrize("at", [0, 4])
def test_level_that_is_not_one_of_those_given_raises(loop: Loop, at: int) -> None:
    levels = LEVELS["7x-paper"]
    handle = jitaccel.apply(loop.model, "7x-paper", noise_levels=levels, execution="indexed")
    with handle, tiny.forwards(loop.model) as seen:
        state = loop.run(levels, tiny.start(), steps=at)[-1] if at else tiny.start()
        seen.clear()
        with pytest.raises(ConfigError, match=r"noise_levels given to apply, got level 0\.5"):
            loop.velocity(state, 0.5)
        assert not seen


# Images taken in turn: a step of one, then a step of another


def in_turn(
    loop: Loop,
    levels: Sequence[float],
    starts: Sequence[Tensor],
    *,
    texts: Sequence[int] = (0, 0, 0),
    orders: Sequence[str] = ("none",) * 3,
    delays: Sequence[int] = (0, 0, 0),
    in_place: bool = False,
) -> list[Tensor]:
    """Returns the final states of images that take their steps in turn; `delays`: rounds before each begins."""
    states = [start.to(loop.dtype).clone() for start in starts]
    for i in range(len(levels) - 1 + max(delays)):
        for k, state in enumerate(states):
            at = i - delays[k]
            if not 0 <= at < len(levels) - 1:
                continue
            if orders[k] == "none":
                velocity = loop.velocity(state, levels[at], texts[k])
            else:
                velocity = loop.guided(state, levels[at], orders[k])
            if in_place:
                state.add_(velocity, alpha=levels[at + 1] - levels[at])
            else:
                states[k] = (state.float() + (levels[at + 1] - levels[at]) * velocity.float()).to(loop.dtype)
    return states


def alone(loop: Loop, levels: Sequence[float], starts: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Returns the same images, each made before the next begins."""
    singles = [
        {name: [value[k]] if name != "in_place" else value for name, value in options.items() if name != "delays"}
        for k in range(len(starts))
    ]
    return [
        in_turn(loop, levels, [start], delays=(0,), **single)[0] for start, single in zip(starts, singles, strict=True)
    ]


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"texts": (0, 1, 0)},
        {"delays": (0, 3, 1)},
        {"orders": ("positive first", "none", "negative first")},
        {"in_place": True},
    ],
    ids=["same text", "other texts", "begun later", "guided", "in place"],
)
def test_images_taken_in_turn_are_the_images_alone(given: bool, dtype: torch.dtype, options: dict[str, Any]) -> None:
    loop, levels = Loop(dtype), LEVELS["4x-paper"]  # bfloat16 makes 1.0 of the first two of these
    starts = [tiny.start(seed) for seed in (1, 2, 3)]
    with jitaccel.apply(loop.model, "4x-paper", noise_levels=levels if given else None) as handle:
        expected = alone(loop, levels, starts, **options)
        images = in_turn(loop, levels, starts, **options)
        assert handle.stats().generations == 6
    for image, single in zip(images, expected, strict=True):
        assert torch.equal(image, single)


@pytest.mark.parametrize("levels", [UNIFORM, SHIFTED], ids=["uniform", "shifted"])
def test_images_in_turn_on_levels_that_nobody_told_are_the_images_alone(loop: Loop, levels: tuple[float, ...]) -> None:
    starts = [tiny.start(seed) for seed in (1, 2)]
    options = {"delays": (0, 2)}
    with jitaccel.apply(loop.model, EXACT):
        expected = alone(loop, levels, starts, **options)
        images = in_turn(loop, levels, starts, **options)
    assert all(torch.equal(*pair) for pair in zip(images, expected, strict=True))


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_velocities_that_the_loop_writes_are_remembered_as_they_were(loop: Loop, given: bool) -> None:
    levels, starts = LEVELS["7x-paper"], [tiny.start(1), tiny.start(2)]
    with jitaccel.apply(loop.model, "7x-paper", noise_levels=levels if given else None) as handle:
        expected = alone(loop, levels, starts)
        states = [start.clone() for start in starts]
        for level, next_level in pairwise(levels):
            for k, state in enumerate(states):
                velocity = loop.velocity(state, level)
                states[k] = state + (next_level - level) * velocity
                velocity.fill_(torch.nan)  # a buffer that is used again
        assert handle.stats().generations == 4
    for state, single in zip(states, expected, strict=True):
        assert torch.equal(state, single)


def test_images_of_different_shape_taken_in_turn_are_the_images_alone(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    starts = [tiny.start(1), torch.cat([tiny.start(2), tiny.start(3)])]
    with jitaccel.apply(loop.model, SHORT):
        expected = alone(loop, levels, starts)
        assert all(torch.equal(*pair) for pair in zip(in_turn(loop, levels, starts), expected, strict=True))


def test_statistics_are_of_the_image_called_last(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    with jitaccel.apply(loop.model, SHORT) as handle:
        in_turn(loop, levels, [tiny.start(1), tiny.start(2)], delays=(0, 2))
        assert len(handle.stats().steps) == len(levels) - 1
        loop.velocity(tiny.start(3), 1.0)
        assert len(handle.stats().steps) == 1 and handle.stats().generations == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_images_in_turn_from_one_noise_are_refused(given: bool, dtype: torch.dtype) -> None:
    loop, levels = Loop(dtype), LEVELS["4x-paper"]
    with (
        jitaccel.apply(loop.model, "4x-paper", noise_levels=levels if given else None),
        pytest.raises(ConfigError, match=r"must start from different noise.*run them one after the other"),
    ):
        in_turn(loop, levels, [tiny.start(1), tiny.start(1)], texts=(0, 1))


def test_failure_of_one_image_leaves_the_others_alone(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    starts = [tiny.start(1), tiny.start(2)]
    with jitaccel.apply(loop.model, SHORT, noise_levels=levels):
        expected = alone(loop, levels, starts)
        states = [loop.run(levels, start, steps=1)[-1] for start in starts]
        hook = loop.model.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.velocity(states[1], levels[1])
        hook.remove()
        state = states[0]
        for level, next_level in pairwise(levels[1:]):
            state = state + (next_level - level) * loop.velocity(state, level)
        assert torch.equal(state, expected[0])


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_state_that_is_not_finite_belongs_to_the_image_that_broke(loop: Loop, given: bool) -> None:
    levels, starts = LEVELS["7x-paper"], [tiny.start(1), tiny.start(2)]
    with jitaccel.apply(loop.model, "7x-paper", noise_levels=levels if given else None):
        expected = alone(loop, levels, starts)[0]
        states = [loop.run(levels, start, steps=2)[-1] for start in starts]
        states[1] = states[1] + torch.nan
        for level, next_level in pairwise(levels[2:5]):  # to the end of the first stage
            for k in (0, 1):
                states[k] = states[k] + (next_level - level) * loop.velocity(states[k], level)
        states[0] = states[0] + (levels[5] - levels[4]) * loop.velocity(states[0], levels[4])
        with pytest.raises(jitaccel.NonFiniteVelocityError, match="at step 2"):
            loop.velocity(states[1], levels[4])
        first = states[0]
        for level, next_level in pairwise(levels[5:]):
            first = first + (next_level - level) * loop.velocity(first, level)
        assert torch.equal(first, expected)


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_state_edited_between_steps_stays_one_generation(loop: Loop, given: bool) -> None:
    levels, mask = LEVELS["7x-paper"], (torch.arange(tiny.NUM_TOKENS) % 2 == 0)[:, None]
    original, noise = tiny.start(8), tiny.start(0)
    with jitaccel.apply(loop.model, "7x-paper", noise_levels=levels if given else None) as handle:
        state = noise
        for level, next_level in pairwise(levels):
            state = state + (next_level - level) * loop.velocity(state, level)
            noised = (1 - next_level) * original + next_level * tiny.start(int(100 * level))
            state = torch.where(mask, noised, state)
        assert handle.stats().generations == 1
        stages = [PRESETS["7x-paper"].stage_of_step(i, len(levels) - 1) for i in range(len(levels) - 1)]
        assert [step.stage for step in handle.stats().steps] == stages


def test_more_generations_under_way_than_are_kept_are_refused_until_a_reset(loop: Loop) -> None:
    loop.velocity = _on_small_grid(loop.velocity)  # type: ignore[method-assign]
    with jitaccel.apply(loop.model, "7x-paper") as handle:
        for seed in range(64):
            loop.velocity(tiny.start(seed, (6, 6)), 1.0)
        with pytest.raises(ConfigError, match=r"at most 64 generations.*handle\.reset\(\)"):
            loop.velocity(tiny.start(64, (6, 6)), 1.0)
        handle.reset()
        loop.velocity(tiny.start(64, (6, 6)), 1.0)


def test_finished_and_forgotten_generations_are_let_go(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = noise_levels(SHORT)
    monkeypatch.setattr("jitaccel.patches.loops.velocity._FORGOTTEN_AFTER", 20)
    with jitaccel.apply(loop.model, SHORT) as handle:
        loop.run(levels, tiny.start(99), steps=2)
        for seed in range(6):
            loop.run(levels, tiny.start(seed))
        assert len(handle.route._generations) <= 3  # type: ignore[attr-defined]


# What it leaves


def test_remove_restores_the_transformer(loop: Loop) -> None:
    before, keys = dict(vars(loop.model)), list(loop.model.state_dict())
    dense = loop.run(UNIFORM, tiny.start(), steps=2)[-1]
    handle = jitaccel.apply(loop.model, SHORT)
    loop.run(noise_levels(SHORT), tiny.start())
    assert list(loop.model.state_dict()) == keys
    for _ in range(2):
        handle.remove()
        assert vars(loop.model).keys() == before.keys()
        assert all(vars(loop.model)[name] is value for name, value in before.items())
        assert torch.equal(loop.run(UNIFORM, tiny.start(), steps=2)[-1], dense)


def test_applying_again_replaces_the_first(loop: Loop) -> None:
    first = jitaccel.apply(loop.model, SHORT)
    with jitaccel.apply(loop.model, "7x-paper") as second:
        assert not first.is_active and second.is_active
        loop.run(LEVELS["7x-paper"], tiny.start())
        first.remove()
        assert second.stats().steps[0].tokens == PRESETS["7x-paper"].token_counts(tiny.NUM_TOKENS)[0]
        assert first.stats().generations == 0
    assert "forward" not in vars(loop.model)


def test_transformer_and_a_pipeline_of_it_may_both_be_patched(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    alone = through_pipeline(EXACT)
    with jitaccel.apply(loop.model, SHORT):
        bare = loop.run(levels, tiny.start())[-1]
    embeds, pooled, _ = loop.texts[0]
    call = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "latents": tiny.start()}
    with jitaccel.apply(loop.model, SHORT), jitaccel.apply(loop.pipe, EXACT):
        assert torch.equal(generate(loop.pipe, **call), alone)
        assert torch.equal(loop.run(levels, tiny.start())[-1], bare)
        assert torch.equal(generate(loop.pipe, **call), alone)
    assert "forward" not in vars(loop.model)


def test_signature_stays(loop: Loop) -> None:
    before = inspect.signature(loop.model.forward)
    with jitaccel.apply(loop.model, SHORT):
        assert inspect.signature(loop.model.forward) == before
    assert inspect.signature(loop.model.forward) == before


def test_gradients_may_be_on(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    embeds, pooled, text_ids = loop.texts[0]
    with jitaccel.apply(loop.model, SHORT):
        expected = loop.run(levels, tiny.start())[-1]
        state = tiny.start()
        for level, next_level in pairwise(levels):
            arguments = (state, embeds, pooled, torch.tensor([level]), tiny.ids(), text_ids, torch.tensor([3.5]))
            state = state + (next_level - level) * loop.model(*arguments).sample
    assert state.requires_grad
    assert relative_error(state.detach(), expected) < 1e-5
