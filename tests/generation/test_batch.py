"""`generate_batch`: requests of any size, prompt and stage share each forward, with the same results as alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, NonFiniteVelocityError, Request, UnsupportedModelError, generate_batch
from tests.support import tiny
from tests.support.tiny import PIXELS_PER_TOKEN, SHORT, TEXT_TOKENS, counted, relative_error

LONGER = SHORT.replace(steps=7)
NATIVE = SHORT.replace(schedule="native")


def request(prompt: str = "a red circle", grid: tuple[int, int] = (12, 12), **fields: Any) -> Request:
    height, width = (side * PIXELS_PER_TOKEN for side in grid)
    settings: dict[str, Any] = {"preset": SHORT, "max_sequence_length": TEXT_TOKENS, **fields}
    return Request(prompt=prompt, height=height, width=width, **settings)


def through_pipeline(pipe: Any, asked: Request) -> Tensor:
    """Returns the latents (N, D) that the patched pipeline makes of a request."""
    named = ("negative_prompt", "true_cfg_scale", "guidance_scale")
    given = {name: value for name in named if (value := getattr(asked, name)) is not None}
    with jitaccel.apply(pipe, asked.config(), execution="indexed"):
        latents: Tensor = pipe(
            asked.prompt,
            **given,
            height=asked.height,
            width=asked.width,
            max_sequence_length=asked.max_sequence_length,
            generator=torch.Generator().manual_seed(asked.seed),
            output_type="latent",
            return_dict=False,
        )[0]
    return latents[0]


BATCHES = {
    "one": [request()],
    "same": [request(seed=1), request("blue", seed=2)],
    "sizes": [request(grid=(12, 12)), request(grid=(8, 14)), request(grid=(6, 6))],
    "texts": [request(max_sequence_length=3), request("green square on the left")],
    "stages": [
        request(), request(preset=LONGER, seed=3), request(preset="7x-paper", seed=4), request(preset="7x", seed=5),
    ],
    "guided": [request(), request(negative_prompt="blue", true_cfg_scale=3.0, seed=5)],
    "levels": [request(preset=NATIVE), request(grid=(6, 8), preset=NATIVE, guidance_scale=1.0)],
    "dense": [request(preset="dense", steps=4), request(seed=6)],
    "all": [
        request(grid=(8, 14), preset=LONGER, max_sequence_length=2),
        request("blue", seed=7, negative_prompt="red", true_cfg_scale=2.0),
        request("green", grid=(6, 6), preset=NATIVE, seed=8, guidance_scale=2.0),
    ],
}


@pytest.mark.parametrize("execution", ["auto", "indexed"])
@pytest.mark.parametrize("case", BATCHES)
def test_each_request_gets_what_the_pipeline_gives_it_alone(pipe: Any, case: str, execution: Any) -> None:
    outcomes = generate_batch(pipe, BATCHES[case], output_type="latent", execution=execution)
    assert [outcome.request for outcome in outcomes] == BATCHES[case]
    for asked, outcome in zip(BATCHES[case], outcomes, strict=True):
        assert relative_error(outcome.image, through_pipeline(pipe, asked)) < 1e-5


def test_model_without_embedded_guidance_runs() -> None:
    pipe = tiny.pipeline(transformer=tiny.transformer(guidance_embeds=False))
    outcome = generate_batch(pipe, [request()], output_type="latent")[0]
    assert relative_error(outcome.image, through_pipeline(pipe, request())) < 1e-5


def test_bfloat16_requests_are_the_pipelines() -> None:
    """Dense ones, since rounding may activate other tokens."""
    pipe = tiny.pipeline(transformer=tiny.transformer().to(torch.bfloat16))
    for name in ("text_encoder", "text_encoder_2"):
        setattr(pipe, name, copy.deepcopy(getattr(pipe, name)).to(torch.bfloat16))
    asked = [request(preset="dense", steps=4, seed=seed, grid=grid) for seed, grid in ((1, (12, 12)), (2, (8, 14)))]
    for outcome in generate_batch(pipe, asked, output_type="latent", execution="packed"):
        assert outcome.image.dtype == torch.bfloat16
        assert relative_error(outcome.image, through_pipeline(pipe, outcome.request)) < 0.05


def test_all_requests_share_each_forward(pipe: Any) -> None:
    asked = [request(), request(preset=LONGER, negative_prompt="blue", true_cfg_scale=2.0, grid=(6, 6))]
    with counted(pipe.transformer) as seen:
        outcomes = generate_batch(pipe, asked, output_type="latent")
    small, large = SHORT.token_counts(36), SHORT.token_counts(144)
    ends = LONGER.stage_ends(7)
    stages = [sum(step >= end for end in ends) for step in range(7)]
    expected = [2 * small[stage] for stage in stages]
    for step, stage in enumerate((0, 0, 1, 2, 2)):
        expected[step] += large[stage]
    assert seen == expected
    assert [outcome.token_steps for outcome in outcomes] == [
        2 * large[0] + large[1] + 2 * large[2],
        sum(small[s] for s in stages),
    ]


def test_pictures_are_those_of_the_pipeline(pipe: Any) -> None:
    outcomes = generate_batch(pipe, [request(), request(grid=(8, 14))])
    assert [outcome.image.size for outcome in outcomes] == [(48, 48), (56, 32)]
    with jitaccel.apply(pipe, SHORT, execution="indexed"):
        alone = pipe(
            "a red circle",
            height=48,
            width=48,
            max_sequence_length=TEXT_TOKENS,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    assert isinstance(outcomes[0].image, Image.Image)
    difference = [abs(a - b) for a, b in zip(outcomes[0].image.tobytes(), alone.tobytes(), strict=True)]
    assert max(difference) <= 1


def test_nothing_of_the_pipeline_or_the_global_generator_changes(pipe: Any) -> None:
    def owned() -> list[dict[str, Any]]:
        return [dict(vars(part)) for part in (pipe, pipe.scheduler, pipe.transformer)]

    pipe(  # diffusers leaves a registry on modules that a pipeline ran
        "a", height=16, width=16, num_inference_steps=1, max_sequence_length=TEXT_TOKENS, output_type="latent"
    )
    before, state = owned(), torch.get_rng_state()
    generate_batch(pipe, [request(), request(preset=NATIVE)])
    assert torch.equal(torch.get_rng_state(), state)
    for old, new in zip(before, owned(), strict=True):
        assert old.keys() == new.keys() and all(old[name] is new[name] for name in old if name != "_modules")


@pytest.mark.parametrize("step", [0, 3, 4])
def test_request_that_fails_on_its_way_fails_alone(pipe: Any, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    from jitaccel.patches.diffusers.batch import Job

    asked = [request(seed=1), request(seed=2), request(seed=3)]
    advance = Job.advance

    def break_second(self: Job, branches: Any) -> bool:
        broken = self.request is asked[1] and self.index == step
        return advance(self, [branch * float("nan") if broken else branch for branch in branches])

    monkeypatch.setattr(Job, "advance", break_second)
    outcomes = generate_batch(pipe, asked, output_type="latent")
    assert isinstance(outcomes[1].error, NonFiniteVelocityError) and f"at step {step}" in str(outcomes[1].error)
    with pytest.raises(NonFiniteVelocityError):
        _ = outcomes[1].image
    for k in (0, 2):
        assert relative_error(outcomes[k].image, through_pipeline(pipe, asked[k])) < 1e-5


def test_forward_that_fails_for_all_is_tried_for_each(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Like memory that suffices for one request but not for all."""
    expected = [through_pipeline(pipe, request(seed=seed)) for seed in (1, 2)]
    tokens = SHORT.token_counts(144)

    def full(_: Any, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[0] > tokens[2]:
            raise torch.OutOfMemoryError("not enough for two")

    hook = pipe.transformer.x_embedder.register_forward_pre_hook(full)
    try:
        outcomes = generate_batch(pipe, [request(seed=1), request(seed=2)], output_type="latent")
    finally:
        hook.remove()
    assert all(relative_error(o.image, e) < 1e-5 for o, e in zip(outcomes, expected, strict=True))
    assert "the forward of 2 requests failed (OutOfMemoryError: not enough for two)" in caplog.text


def test_failing_forward_of_one_request_is_its_outcome(pipe: Any) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    hook = pipe.transformer.x_embedder.register_forward_pre_hook(broken)
    try:
        outcomes = generate_batch(pipe, [request(), request()], output_type="latent")
    finally:
        hook.remove()
    assert [str(outcome.error) for outcome in outcomes] == ["broken", "broken"]


def test_no_requests_give_no_outcomes(pipe: Any) -> None:
    assert generate_batch(pipe, []) == []


def test_bad_requests_are_all_named_before_any_is_run(pipe: Any) -> None:
    asked: list[Any] = [
        request(),
        request(preset="8x"),
        request(steps=2),
        "a red circle",
        request(preset=SHORT.replace(steps="caller")),
    ]
    with counted(pipe.transformer) as seen, pytest.raises(ConfigError) as raised:
        generate_batch(pipe, asked)
    assert seen == []
    lines = str(raised.value).splitlines()
    for index, words in (
        (1, "got '8x'"),
        (2, "use 3 steps"),
        (3, "must be a jitaccel.Request, got str"),
        (4, "give steps="),
    ):
        assert any(f"requests[{index}]" in line and words in line for line in lines), (index, lines)
    assert not any("requests[0]" in line for line in lines)


BAD_FIELDS: list[tuple[str, Any]] = [
    *(("prompt", value) for value in (None, 3, ["a", "b"], b"a", "\ud800")),
    *(("negative_prompt", value) for value in (3, ["a"], "\udfff")),
    *(("height", value) for value in (48.0, "48", True, 0, -48, 2**63)),
    *(("width", value) for value in (48.0, float("nan"), 10**30)),
    *(("seed", value) for value in (-1, 2**64, 1.5, "1", None, True, [1])),
    *(("guidance_scale", value) for value in (float("nan"), float("inf"), -1.0, "3", 10**400, True)),
    *(("true_cfg_scale", value) for value in (float("nan"), -float("inf"), -0.5, 10**400)),
    *(("max_sequence_length", value) for value in (0, -1, 513, 2.0, True)),
    *(("steps", value) for value in (0, 2**63, 4.5, "4", float("nan"))),
    *(("preset", value) for value in (None, 7, ["7x"], {"7x": 1})),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=[f"{name}={value!r:.12}" for name, value in BAD_FIELDS])
def test_bad_field_is_named_with_its_request_before_any_is_run(pipe: Any, name: str, value: Any) -> None:
    settings = {"prompt": "a", "height": 48, "width": 48, "preset": SHORT, name: value}
    with counted(pipe.transformer) as seen, pytest.raises(ConfigError) as raised:
        generate_batch(pipe, [request(), Request(**settings)])
    assert seen == []
    assert all(line.startswith("generate_batch: requests[1]:") for line in str(raised.value).splitlines())
    assert f"{name} must be" in str(raised.value)


def test_greatest_seed_is_the_pipelines_own(pipe: Any) -> None:
    outcome = generate_batch(pipe, [request(seed=2**64 - 1)], output_type="latent")[0]
    assert relative_error(outcome.image, through_pipeline(pipe, request(seed=2**64 - 1))) < 1e-5


def test_what_is_no_list_of_requests_is_refused(pipe: Any) -> None:
    for given in (None, 3, request()):
        with pytest.raises(ConfigError, match="requests must be a list of"):
            generate_batch(pipe, given)  # type: ignore[arg-type]


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


@pytest.mark.parametrize("place", ["encode_prompt", "forward"])
def test_panic_of_one_request_is_its_outcome(pipe: Any, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    asked = [request(seed=1), request("blue", seed=2), request(seed=3)]
    expected = [through_pipeline(pipe, each) for each in asked]
    if place == "encode_prompt":
        encode = pipe.encode_prompt

        def broken(**call: Any) -> Any:
            if call["prompt"] == "blue":
                raise Panic("no entry found for key")
            return encode(**call)

        monkeypatch.setattr(pipe, "encode_prompt", broken)
    else:
        from jitaccel.patches.diffusers import batch

        run = batch._Packed.__call__

        def panic(self: Any, jobs: Any) -> Any:
            if any(job.request is asked[1] for job in jobs):
                raise Panic("no entry found for key")
            return run(self, jobs)

        monkeypatch.setattr(batch._Packed, "__call__", panic)
    outcomes = generate_batch(pipe, asked, output_type="latent")
    assert "Panic: no entry found for key" in str(outcomes[1].error) and isinstance(outcomes[1].error, Exception)
    for k in (0, 2):
        assert relative_error(outcomes[k].image, expected[k]) < 1e-5


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_ends_the_program_ends_the_batch(pipe: Any, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def broken(**_: Any) -> Any:
        raise error

    monkeypatch.setattr(pipe, "encode_prompt", broken)
    with pytest.raises(error):
        generate_batch(pipe, [request()])


def test_bad_sizes_are_all_named_before_any_is_run(pipe: Any) -> None:
    bad = Request(prompt="a", height=50, width=48, preset=SHORT)
    few = Request(prompt="a", height=4, width=4, preset=SHORT)
    with counted(pipe.transformer) as seen, pytest.raises(ConfigError) as raised:
        generate_batch(pipe, [request(), bad, few])
    assert seen == []
    first, second = str(raised.value).splitlines()
    assert "requests[1]: height and width must be multiples of 4 pixels, got 50x48; round them to 48x48" in first
    assert "requests[2]" in second and "give every stage a token" in second


def test_patched_pipelines_and_bare_transformers_are_refused(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT), pytest.raises(ConfigError, match="must not be patched"):
        generate_batch(pipe, [request()])
    with pytest.raises(UnsupportedModelError, match=r"must be a pipeline of diffusers, .*got FluxTransformer2DModel"):
        generate_batch(pipe.transformer, [request()])
    with pytest.raises(ConfigError, match="output_type must be one of"):
        generate_batch(pipe, [request()], output_type="np")  # type: ignore[arg-type]


def test_backend_that_cannot_be_used_is_refused_before_any_request(pipe: Any) -> None:
    with counted(pipe.transformer) as seen, pytest.raises(ConfigError, match="flash_attn_3"):
        generate_batch(pipe, [request()], attention="flash_attn_3")
    assert seen == []


def test_fallbacks_are_logged(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe.transformer.single_transformer_blocks[0].register_forward_hook(lambda *_: None)
    generate_batch(pipe, [request()], output_type="latent")
    assert "requests run one after the other, because single_transformer_blocks.0 has forward hooks" in caplog.text


def test_strict_refuses_a_model_that_is_not_covered(pipe: Any) -> None:
    pipe.transformer.single_transformer_blocks[0].register_forward_hook(lambda *_: None)
    outcome = generate_batch(pipe, [request()], output_type="latent")[0]
    assert relative_error(outcome.image, through_pipeline(pipe, request())) < 1e-5
    with pytest.raises(UnsupportedModelError, match="has forward hooks"):
        generate_batch(pipe, [request()], strict=True)


def test_steps_and_outcomes_are_told_as_they_come(pipe: Any) -> None:
    steps: list[tuple[int, int, int]] = []
    told: list[tuple[int, int]] = []
    outcomes = generate_batch(
        pipe,
        [request(preset=LONGER), request()],
        output_type="latent",
        on_step=lambda *step: steps.append(step),
        on_outcome=lambda index, outcome: told.append((index, len(steps))),
    )
    assert [step for step in steps if step[0] == 0] == [(0, k, 7) for k in range(1, 8)]
    assert [step for step in steps if step[0] == 1] == [(1, k, 5) for k in range(1, 6)]
    assert told == [(1, 10), (0, 12)]  # the shorter one does not wait for the other
    assert all(outcome.error is None for outcome in outcomes)


@pytest.mark.parametrize("execution", ["auto", "indexed"])
def test_request_that_is_dropped_at_a_step_ends_alone(pipe: Any, execution: Any) -> None:
    asked = [request(), request("blue", seed=1), request(grid=(6, 6), seed=2)]
    told: dict[int, Any] = {}

    def drop(index: int, step: int, steps: int) -> None:
        if (index, step) == (1, 2):
            raise ArithmeticError("nobody awaits it")

    with counted(pipe.transformer) as seen:
        outcomes = generate_batch(
            pipe, asked, execution=execution, output_type="latent", on_step=drop, on_outcome=told.__setitem__
        )
    assert isinstance(outcomes[1].error, ArithmeticError) and len(seen) == (5 if execution == "auto" else 12)
    assert [told[k] for k in range(3)] == outcomes
    for k in (0, 2):
        assert relative_error(outcomes[k].image, through_pipeline(pipe, asked[k])) < 1e-5


def test_outcome_of_indexed_execution_is_that_of_the_request_alone_bit_for_bit(pipe: Any) -> None:
    for asked, outcome in zip(
        BATCHES["all"], generate_batch(pipe, BATCHES["all"], execution="indexed", output_type="latent"), strict=True
    ):
        alone = generate_batch(pipe, [asked], execution="indexed", output_type="latent")[0]
        assert torch.equal(outcome.image, alone.image)
        assert torch.equal(outcome.image, through_pipeline(pipe, asked))  # no pooled stage among these
