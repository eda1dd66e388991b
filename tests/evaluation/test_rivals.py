"""Rivals in `jitaccel eval`: costs count what ran, the pipeline is restored, and images do not affect each other."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jitaccel.errors import CommandError
from jitaccel.evaluation.comparison import Method, TimedCall, generate
from jitaccel.evaluation.methods import parse_methods
from jitaccel.method.schedule import beta_levels
from jitaccel.patches.flux.flops import flux_flops

diffusers = pytest.importorskip("diffusers")
if not hasattr(diffusers, "TaylorSeerCacheConfig"):
    pytest.skip("this diffusers has no such caches", allow_module_level=True)
tiny = importlib.import_module("tests.support.tiny")  # imports diffusers

SIDE = 48
TOKENS = (SIDE // tiny.PIXELS_PER_TOKEN) ** 2
CACHES = ("firstblock:5:0.9", "taylorseer:6:3", "taylorseer-lite:6:3")


@pytest.fixture
def pipe() -> Any:
    """A tiny pipeline of two double blocks and three single ones."""
    return tiny.pipeline(transformer=tiny.transformer(num_layers=2, num_single_layers=3))


def method(word: str) -> Method:
    return parse_methods(word)[0]


def made(pipe: Any, word: str, seeds: tuple[int, ...] = (0,), on_step: Any = None, **call: Any) -> TimedCall:
    """Returns a method's latents (B, N, D) for one prompt and each seed, made one by one."""
    settings: dict[str, Any] = {
        "prompt": [("a red circle", "blue square on left")[seed % 2] for seed in seeds],
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "height": SIDE,
        "width": SIDE,
        "max_sequence_length": tiny.TEXT_TOKENS,
        "output_type": "latent",
    }
    return generate(pipe, method(word), on_step, **{**settings, **call})


def dense_step_flops(pipe: Any, tokens: int = TOKENS) -> int:
    return flux_flops(pipe.transformer.config, tokens, tiny.TEXT_TOKENS)


def attributes(pipe: Any) -> list[tuple[str, dict[str, Any], list[str]]]:
    """Everything in the transformer's modules, by identity, in order."""
    return [
        (name, {key: id(value) for key, value in vars(module).items()}, [*module._modules])
        for name, module in pipe.transformer.named_modules()
    ]


@pytest.mark.parametrize("word", ["firstblock:3:0", "taylorseer:4:1", "taylorseer-lite:4:1"])
def test_cache_that_leaves_nothing_out_is_the_dense_run(pipe: Any, word: str) -> None:
    steps = method(word).steps
    dense, cached = made(pipe, f"dense:{steps}"), made(pipe, word)
    assert torch.equal(dense.pictures, cached.pictures)
    assert cached.flops == dense.flops == steps * dense_step_flops(pipe)
    assert cached.token_steps == dense.token_steps == steps * TOKENS
    assert cached.stats is None and cached.denoise_s > 0 and cached.whole_s > cached.denoise_s


@pytest.mark.parametrize("word", CACHES)
def test_cost_of_a_cache_is_what_torch_counts(pipe: Any, word: str) -> None:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        cached = made(pipe, word)
    assert cached.flops == sum(counter.get_flop_counts()["FluxTransformer2DModel"].values())
    share = cached.flops / (method(word).steps * dense_step_flops(pipe))
    assert 0.3 < share < 0.95
    assert cached.token_steps == pytest.approx(share * method(word).steps * TOKENS, abs=1)


def test_cost_falls_with_the_threshold_and_the_interval(pipe: Any) -> None:
    for words in (
        ("firstblock:5:0", "firstblock:5:0.3", "firstblock:5:9"),
        ("taylorseer-lite:8:1", "taylorseer-lite:8:2", "taylorseer-lite:8:4"),
    ):
        costs = [made(pipe, word).flops for word in words]
        assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
    assert made(pipe, "taylorseer:8:4").flops > costs[-1]


@pytest.mark.parametrize("word", CACHES)
def test_caches_decide_for_each_image_alone_and_start_empty(pipe: Any, word: str) -> None:
    alone = [made(tiny.pipeline(transformer=pipe.transformer), word, (seed,)) for seed in (0, 1)]
    steps: list[int] = []
    both = made(pipe, word, (0, 1), lambda: steps.append(1))
    assert torch.equal(both.pictures, torch.cat([each.pictures for each in alone]))
    assert both.flops == sum(each.flops for each in alone)
    assert both.token_steps == pytest.approx(sum(each.token_steps for each in alone) / 2, abs=1)
    assert len(steps) == method(word).steps
    assert torch.equal(made(pipe, word, (1,)).pictures, alone[1].pictures)


@pytest.mark.parametrize("word", [*CACHES, "half:4:2"])
@pytest.mark.parametrize("is_used", [False, True])
def test_pipeline_is_as_before_even_after_an_exception(pipe: Any, word: str, is_used: bool) -> None:
    if is_used:  # the pipeline's own call leaves a registry of hooks
        tiny.generate(pipe, num_inference_steps=1)
    dense = tiny.generate(tiny.pipeline(transformer=copy.deepcopy(pipe.transformer)), num_inference_steps=2)
    before = attributes(pipe)
    made(pipe, word)
    assert attributes(pipe) == before

    def fail() -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        made(pipe, word, on_step=fail)
    assert attributes(pipe) == before and not pipe.transformer.is_cache_enabled
    assert torch.equal(tiny.generate(pipe, num_inference_steps=2), dense)


def test_pictures_come_joined_in_every_form(pipe: Any) -> None:
    arrays = made(pipe, "firstblock:2:0", (0, 1), output_type="np").pictures
    images = made(pipe, "firstblock:2:0", (0, 1), output_type="pil").pictures
    assert arrays.shape == (2, SIDE, SIDE, 3) and len(images) == 2
    assert np.allclose(np.asarray(images[1]) / 255.0, arrays[1], atol=1 / 255)
    one = made(pipe, "firstblock:2:0", prompt="a red circle", generator=torch.Generator().manual_seed(0)).pictures
    assert torch.equal(one, made(pipe, "firstblock:2:0").pictures)


def test_half_is_two_euler_loops_with_an_upsampled_estimate_between(pipe: Any) -> None:
    state = torch.random.get_rng_state()
    half = made(pipe, "half:4:3", (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(half.pictures, made(pipe, "half:4:3", (0, 1)).pictures)
    expected = torch.cat([_half_by_hand(pipe, seed) for seed in (0, 1)])
    assert tiny.relative_error(half.pictures, expected) < 1e-4
    costs = 3 * dense_step_flops(pipe, TOKENS // 4) + dense_step_flops(pipe)
    assert half.flops == 2 * costs and half.token_steps == 3 * TOKENS // 4 + TOKENS and half.stats is None


def _half_by_hand(pipe: Any, seed: int) -> torch.Tensor:
    """Three steps at half the size and one at the whole, of four beta levels, unpacked latents in between."""
    generator = torch.Generator().manual_seed(seed)
    levels = beta_levels(4)
    grid = SIDE // tiny.PIXELS_PER_TOKEN
    channels = tiny.CHANNELS // 4
    small = pipe._pack_latents(torch.randn(1, channels, grid, grid, generator=generator), 1, channels, grid, grid)
    clean = _euler(pipe, small, (*levels[:3], 0.0), grid // 2, seed)
    unpacked = pipe._unpack_latents(clean, SIDE // 2, SIDE // 2, pipe.vae_scale_factor)
    large = torch.nn.functional.interpolate(unpacked, size=(2 * grid, 2 * grid), mode="bicubic")
    noise = torch.randn(large.shape, generator=generator)
    noisy = (1 - levels[3]) * large + levels[3] * noise
    return _euler(pipe, pipe._pack_latents(noisy, 1, channels, 2 * grid, 2 * grid), levels[3:], grid, seed)


def _euler(pipe: Any, state: torch.Tensor, levels: tuple[float, ...], grid: int, seed: int) -> torch.Tensor:
    prompt = ("a red circle", "blue square on left")[seed % 2]
    text, pooled, text_ids = pipe.encode_prompt(prompt, prompt, max_sequence_length=tiny.TEXT_TOKENS)
    for level, following in pairwise(levels):
        with torch.no_grad():
            velocity = pipe.transformer(
                hidden_states=state, encoder_hidden_states=text, pooled_projections=pooled, txt_ids=text_ids,
                timestep=torch.tensor([level]), guidance=torch.tensor([3.5]), img_ids=tiny.ids((grid, grid)),
                return_dict=False,
            )[0]  # fmt: skip
        state = state + (following - level) * velocity
    return state


def test_half_needs_a_size_with_a_half_in_whole_tokens(pipe: Any) -> None:
    with pytest.raises(CommandError, match="multiples of 8, got 48 and 44"):
        made(pipe, "half:4:2", width=44)


def test_other_models_are_refused(pipe: Any) -> None:
    other = SimpleNamespace(transformer=torch.nn.Linear(2, 2))
    with pytest.raises(CommandError, match="FluxTransformer2DModel, got Linear"):
        made(other, "firstblock:2:0.1")
    with pytest.raises(CommandError, match=r"pipeline of FLUX\.1, got SimpleNamespace"):
        made(other, "half:4:2")


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("firstblock:4", "firstblock:STEPS:THRESHOLD, steps from 1 and a threshold from 0, got 'firstblock:4'"),
        ("firstblock:4:x", "got 'firstblock:4:x'"),
        ("firstblock:4:nan", "got 'firstblock:4:nan'"),
        ("firstblock:4:-1", "got 'firstblock:4:-1'"),
        ("firstblock:0:0.1", "got 'firstblock:0:0.1'"),
        ("taylorseer:4:0", "taylorseer:STEPS:INTERVAL"),
        ("taylorseer:4.5:2", "taylorseer:STEPS:INTERVAL"),
        ("taylorseer-lite:4:2:1", "taylorseer-lite:STEPS:INTERVAL"),
        ("half:4:4", "half:STEPS:HALF_STEPS, whole numbers from 1, the second below the first, got 'half:4:4'"),
        ("half:4:0", "half:STEPS:HALF_STEPS"),
        ("cachedit:x", "cachedit:STEPS or cachedit:STEPS:THRESHOLD"),
        ("firstblocks:4:1", "must list dense:N, beta:N, dpm:N, firstblock:STEPS:THRESHOLD"),
        ("half:4:2,half:4:2", "must all be different"),
    ],
)
def test_wrong_words_are_told_with_the_form(word: str, text: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_methods(word)
    assert text in str(caught.value)


def test_settings_are_json_that_tells_methods_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", ModuleType("cache_dit"))
    words = [*CACHES, "taylorseer:6:4", "half:4:2", "half:4:1", "cachedit:9", "cachedit:9:0.2", "dense:4"]
    methods = parse_methods(",".join(words))
    assert [each.name for each in methods] == words
    assert [each.steps for each in methods] == [5, 6, 6, 6, 4, 4, 9, 9, 4]
    settings = [json.dumps(each.settings) for each in methods]
    assert len({*settings}) == len(words)
    assert methods[0].settings == {
        "rival": "firstblock", "steps": 5, "threshold": 0.9, "package": f"diffusers {diffusers.__version__}",
    }  # fmt: skip
    assert methods[-1].config is not None and methods[-1].settings == methods[-1].config.to_dict()
    assert Method(name="untouched", steps=4).settings is None


def test_missing_cache_dit_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cache_dit", raising=False)
    find = {"cache_dit": None}.get
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find(name, ModuleSpec(name, None)))
    with pytest.raises(CommandError, match=r'cache-dit must be installed .*pip install "jitaccel\[cache-dit\]"'):
        parse_methods("dense:4,cachedit:4")


def test_cache_dit_is_enabled_and_disabled_around_each_image(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, Any]] = []

    def enable_cache(given: Any, cache_config: Any) -> None:
        assert given is pipe
        called.append(("enable", vars(cache_config)))
        given.transformer._is_patched = True  # as the real one does, and never takes back

    def disable_cache(given: Any) -> None:
        assert given is pipe
        called.append(("disable", None))

    stand_in: Any = ModuleType("cache_dit")
    stand_in.enable_cache, stand_in.disable_cache = enable_cache, disable_cache
    stand_in.DBCacheConfig = lambda **options: SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "cache_dit", stand_in)
    cached = made(pipe, "cachedit:2", (0, 1))
    assert called == [("enable", {"Fn_compute_blocks": 1}), ("disable", None)] * 2
    assert torch.equal(cached.pictures, torch.cat([made(pipe, "dense:2", (seed,)).pictures for seed in (0, 1)]))
    assert not hasattr(pipe.transformer, "_is_patched")
    called.clear()
    with pytest.raises(ZeroDivisionError):
        made(pipe, "cachedit:2:0.2", on_step=lambda: 1 // 0)
    options = {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.2}
    assert called == [("enable", options), ("disable", None)] and not hasattr(pipe.transformer, "_is_patched")


def test_real_cache_dit_leaves_out_steps_and_no_trace(pipe: Any) -> None:
    pytest.importorskip("cache_dit")
    dense, class_attributes = made(pipe, "dense:12"), dict(vars(type(pipe)))
    before = attributes(pipe)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        cached = made(pipe, "cachedit:12:0.9")
    assert cached.flops == sum(counter.get_flop_counts()["FluxTransformer2DModel"].values()) < dense.flops
    assert attributes(pipe) == before and dict(vars(type(pipe))) == class_attributes
    pictures = [made(pipe, "cachedit:12:0.9", seeds).pictures for seeds in ((0,), (1, 0))]
    assert torch.equal(pictures[0], pictures[1][1:]) and not torch.equal(pictures[0], dense.pictures)
    assert torch.equal(made(pipe, "dense:12").pictures, dense.pictures)
