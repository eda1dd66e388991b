"""The lab's variants equal the product's method if nothing is replaced, and differ otherwise."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jitaccel
from jitaccel.method.config import JiTConfig
from jitaccel.method.presets import PRESETS, pooled_start
from jitaccel.patches.flux.flops import flux_flops

pytest.importorskip("diffusers")

from benchmarks.lab import lifters, picture, report, search, variant
from benchmarks.lab.__main__ import main
from benchmarks.lab.network import CachedNetwork, Texts
from benchmarks.lab.questions import QUESTIONS, native_levels
from benchmarks.lab.sampler import GRID, TEXT_TOKENS, Bench, sample, sample_by_pipeline
from benchmarks.lab.sizes import Sizes, on_levels, sample_sizes
from benchmarks.lab.variant import Variant
from benchmarks.table import RESULTS, read_results
from jitaccel.errors import CommandError
from jitaccel.evaluation.comparison import Method
from jitaccel.evaluation.scenes.prompts import held_out
from jitaccel.loading import load_pipeline
from jitaccel.method.lift import lift, make_lift_plan
from jitaccel.method.schedule import noise_levels
from jitaccel.method.steps import KnownLevels

SHORT = JiTConfig(densities=(0.4, 0.7, 1.0), boundaries=(0.34, 0.67, 1.0), steps=3)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench.of(load_pipeline(None, device="cpu"), held_out(1), seed=5)


def by_product(bench: Bench, config: JiTConfig) -> np.ndarray:
    with jitaccel.apply(bench.pipe, config):
        made = sample_by_pipeline(bench, Method(name="dense", steps=int(config.steps)), mixed=False)
    return made.pictures.astype(int)


@pytest.mark.parametrize("changed", [{}, {"lifter": "clean", "micro_flow": "exact", "noise": "own"}])
def test_a_variant_that_replaces_nothing_is_the_product(bench: Bench, changed: dict[str, Any]) -> None:
    config = SHORT.replace(**changed)
    expected = by_product(bench, config)
    plain = sample(bench, Variant(config=config), mixed=False)
    as_matrix = sample(bench, Variant(config=config, lifter=lifters.blurred), mixed=False)
    assert np.abs(plain.pictures - expected).max() <= 1
    assert np.abs(as_matrix.pictures - expected).max() <= 1


def test_stages_and_cost_of_a_picture(bench: Bench) -> None:
    made = sample(bench, Variant(config=SHORT), mixed=False)
    counts = SHORT.token_counts(1024)
    assert np.bincount(made.stages.ravel()).tolist() == [counts[0], counts[1] - counts[0], 1024 - counts[1]]
    model = bench.pipe.transformer.config
    assert made.gflop[0] == pytest.approx(sum(flux_flops(model, n, TEXT_TOKENS) for n in counts) / 1e9)


@pytest.mark.parametrize(
    "replaced",
    [
        {"lifter": lifters.nearest},
        {"lifter": lifters.linear},
        {"lifter": functools.partial(lifters.weighted, sigma=0.7)},
        {"scores": variant.clean_variance},
        {"scores": variant.gradient},
        {"scores": variant.left_out_error},
        {"scores": variant.words_attended},
        {"scores": variant.fixed_grid},
        {"scores": variant.random_scores},
        {"stale_keys": True},
    ],
    ids=[
        *("nearest", "linear", "weighted", "clean variance", "gradient", "left-out error", "words", "fixed", "random"),
        "stale keys",
    ],  # of their own: workers must agree on them
)
def test_what_a_variant_replaces_changes_the_picture_and_leaves_the_model_as_it_was(
    bench: Bench, replaced: dict[str, Any]
) -> None:
    before = dict(bench.pipe.transformer.attn_processors)
    plain, other = (sample(bench, Variant(config=SHORT, **some), mixed=False) for some in ({}, replaced))
    assert np.abs(plain.pictures.astype(int) - other.pictures).mean() > 0.05
    assert np.isfinite(other.gflop).all() and dict(bench.pipe.transformer.attn_processors) == before
    again = sample(bench, Variant(config=SHORT, **replaced), mixed=False)
    assert np.array_equal(other.pictures, again.pictures)


def test_a_cache_that_never_reuses_changes_nothing_and_one_that_does_costs_less(bench: Bench) -> None:
    config = SHORT.replace(steps=6)
    plain, never, often = (
        sample(bench, Variant(config=config, cache_threshold=threshold), mixed=False) for threshold in (None, 0.0, 10.0)
    )
    assert np.array_equal(plain.pictures, never.pictures) and plain.gflop == pytest.approx(never.gflop)
    assert often.gflop[0] < 0.8 * plain.gflop[0]
    assert not np.array_equal(often.pictures, plain.pictures)


def test_stale_keys_cost_the_first_dense_step_and_more_attention(bench: Bench) -> None:
    plain, stale = (sample(bench, Variant(config=SHORT, stale_keys=each), mixed=False) for each in (False, True))
    model, counts = bench.pipe.transformer.config, SHORT.token_counts(1024)
    width, blocks = model.num_attention_heads * model.attention_head_dim, model.num_layers + model.num_single_layers
    first = flux_flops(model, 1024, TEXT_TOKENS) - flux_flops(model, counts[0], TEXT_TOKENS)
    attended = 4 * blocks * width * (counts[1] + TEXT_TOKENS) * (1024 - counts[1])
    assert stale.gflop[0] - plain.gflop[0] == pytest.approx((first + attended) / 1e9)


def test_attention_to_all_tokens_with_stale_keys_is_the_dense_model(bench: Bench) -> None:
    dense = JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=2)
    plain, stale = (sample(bench, Variant(config=dense, stale_keys=each), mixed=False) for each in (False, True))
    assert np.abs(plain.pictures.astype(int) - stale.pictures).max() <= 1


@pytest.mark.parametrize("lifter", [lifters.nearest, lifters.blurred, lifters.weighted, lifters.linear])
def test_lifters_keep_constants_and_the_blurred_one_is_the_paper_s(lifter: lifters.Lifter) -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randperm(63, generator=generator)[:20].sort().values
    weights = lifter(anchors, (7, 9))
    assert weights.shape == (63, 20) and torch.allclose(weights.sum(dim=1), torch.ones(63), atol=1e-5)
    if lifter is lifters.blurred:
        values = torch.randn(1, 20, 3, generator=generator)
        lifted = weights @ values
        lifted[:, anchors] = values
        assert torch.allclose(lifted, lift(values, make_lift_plan(anchors[None], (7, 9))), atol=1e-5)


def test_linear_lifter_reproduces_planes_between_anchors() -> None:
    anchors = torch.tensor([0, 8, 54, 62, 31])
    row, column = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    plane = (2 * row - 3 * column + 1).flatten()
    assert torch.allclose(lifters.linear(anchors, (7, 9)) @ plane[anchors], plane, atol=1e-4)


def test_native_levels_are_the_pipeline_s(bench: Bench) -> None:
    scheduler = type(bench.pipe.scheduler).from_config(bench.pipe.scheduler.config)
    for steps in (1, 7, 50):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=0.63)
        assert native_levels(steps) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_left_out_error_is_nothing_where_the_velocity_is_constant() -> None:
    clock, state = KnownLevels(SHORT, noise_levels(SHORT)), torch.randn(1, 1024, 4, generator=torch.Generator())
    run, _ = variant.start(Variant(config=SHORT, scores=variant.left_out_error), GRID, clock.step(0), state)
    run.leave(clock.step(0), state, torch.ones(1, run.num_active, 4))
    assert run._left is not None
    end = variant.StageEnd(run=run, left=run._left, lifter=None, words=None)
    assert variant.left_out_error(end).abs().max() < 1e-6


def test_candidates_of_a_search_keep_the_budget(bench: Bench) -> None:
    model = bench.pipe.transformer.config
    found = search.candidates(4.0, model)
    assert len({search.config_name(config) for config in found}) == len(found) > 5
    for config in found:
        counts, ends = config.token_counts(1024), (0, *config.stage_ends(int(config.steps)))
        cost = sum((ends[k + 1] - ends[k]) * flux_flops(model, n, TEXT_TOKENS) for k, n in enumerate(counts))
        assert 3.4 <= cost / flux_flops(model, 1024, TEXT_TOKENS) <= 4.0


def test_search_halves_and_goes_on_with_the_better_half(bench: Bench) -> None:
    among = {str(steps): SHORT.replace(steps=steps) for steps in (3, 4)}
    some = Bench.of(bench.pipe, held_out(4, seed=1), seed=9)
    from jitaccel.evaluation.judging import load_judge

    reference = sample(some, Variant(config=JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=4)))
    first, last = search.search(among, some, load_judge(), 2, reference)
    assert len(first) == 2 and [record["method"] for record in last] == [first[0]["method"]]
    assert (first[0]["prompts"], last[0]["prompts"]) == (2, 4) and first[0]["rank"] <= first[1]["rank"]


def test_candidates_are_thinned_evenly() -> None:
    found = [SHORT.replace(steps=steps) for steps in range(3, 12)]
    assert [config.steps for config in search.thinned(found, 3)] == [3, 7, 11]
    assert search.thinned(found, 9) == search.thinned(found, 20) == found


@pytest.mark.parametrize(("name", "count"), [("few-steps", 13), ("7x", 14)])
def test_levels_searched_hold_the_preset_s_own_and_the_scheduler_s(name: str, count: int) -> None:
    preset = PRESETS[name]
    found = search.on_levels(preset)
    levels = {each: noise_levels(config) for each, config in found.items()}
    assert levels[f"alpha {preset.alpha:g}, beta {preset.beta:g}"] == noise_levels(preset)
    assert len(set(levels.values())) == len(found) == count
    own = {"schedule": "beta", "alpha": preset.alpha, "beta": preset.beta}
    assert all(config.replace(**own) == preset for config in found.values())


def test_a_search_for_nothing_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        search.main([])
    assert "--budget" in capsys.readouterr().err


def test_lab_is_taken_up_and_writes_records_with_paired_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"one": Variant(config=SHORT), "two": Variant(config=SHORT.replace(micro_flow="none"))}
    dense = JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=2)
    for module in ("benchmarks.lab.__main__", "benchmarks.lab.report"):
        monkeypatch.setattr(f"{module}.QUESTIONS", {"micro-flow": short})
        monkeypatch.setattr(f"{module}.CONTROLS", {})
    monkeypatch.setattr("benchmarks.lab.__main__.dense", lambda *given: Variant(config=dense))
    assert main(["--prompts", "2", "--out", str(tmp_path)]) == 0
    rows = (tmp_path / "rows.jsonl").read_text()
    found = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [(record["case"], record["method"]) for record in found][1:] == [
        ("micro-flow", "one"),
        ("micro-flow", "two"),
    ]
    assert found[1]["more"] is None and -1 <= found[2]["more"]["value"] <= 1 and 0 < found[2]["p"] <= 1
    assert report.tables(found) == (tmp_path / "report.md").read_text() in capsys.readouterr().out
    assert main(["--prompts", "2", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "rows.jsonl").read_text() == rows


def test_picture_shows_each_method_once_and_the_reference_first(tmp_path: Path) -> None:
    of = [row for row in read_results(RESULTS) if row["benchmark"] == "quality summary"]
    rows = [row for row in of if row["pixels"] == [256, 256]]
    lines = [json.dumps({**row, "benchmark": "lab", "case": "controls"}) for row in rows]
    (tmp_path / "lab-2026-11-29.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    names = [record["method"] for record in picture.shown(read_results(tmp_path))]
    assert names[0] == "dense:50" and len(set(names)) == len(names) and set(PRESETS) - {"dense", "4x-paper"} <= {*names}
    assert picture.main([str(tmp_path / "quality.png"), "--results", str(tmp_path)]) == 0
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit):
        picture.main([str(tmp_path / "none.png"), "--results", str(tmp_path / "none")])


def test_every_question_names_its_first_variant_s_rivals() -> None:
    for question, some in QUESTIONS.items():
        assert len(some) >= 2, question


def test_cached_network_takes_the_cache_away(bench: Bench) -> None:
    model = bench.pipe.transformer
    with CachedNetwork(model, Texts(words=bench.texts.words, pooled=bench.texts.pooled), GRID, False, 0.1):
        assert model.is_cache_enabled
    assert not model.is_cache_enabled


def test_steps_at_two_sizes_are_the_product_s_pooled_stages(bench: Bench) -> None:
    config = pooled_start(2, 2, 0.86, 0.363)
    expected = by_product(bench, config)
    as_variant = sample(bench, Variant(config=config), mixed=False)
    made = sample_sizes(bench, on_levels(noise_levels(config), (2, 2)), mixed=False)
    assert np.abs(as_variant.pictures - expected).max() <= 1
    assert np.abs(made.pictures - expected).max() <= 1
    assert made.gflop == pytest.approx(as_variant.gflop)


LEVELS = noise_levels(pooled_start(2, 2, 0.86, 0.363))


@pytest.mark.parametrize(
    "changed",
    [{"places": "strided"}, {"places": "centred"}, {"guidance": 0.5}, {"correction": "mean"}, {"correction": "coarse"}],
    ids=str,
)
def test_what_makes_sizes_agree_changes_the_picture_and_costs_what_it_runs(
    bench: Bench, changed: dict[str, Any]
) -> None:
    factors = (1, 2) if "correction" in changed else (2, 2)
    plain, other = (sample_sizes(bench, on_levels(LEVELS, factors, **some), mixed=False) for some in ({}, changed))
    assert np.abs(plain.pictures.astype(int) - other.pictures).mean() > 0.05
    half = flux_flops(bench.pipe.transformer.config, 256, TEXT_TOKENS) / 1e9
    more = {"places": 0, "guidance": 2, "correction": 1}[next(iter(changed))]
    assert (other.gflop - plain.gflop)[0] == pytest.approx(more * half)


def test_a_correction_gives_a_pooled_step_the_clean_estimate_of_the_dense_one(bench: Bench) -> None:
    # At nearly the level of the first step a second one sees nearly the same: corrected, it agrees.
    levels = (1.0, 0.9999, 0.5, 0.0)
    dense, *rest = (
        sample_sizes(bench, on_levels(levels, factors, correction=kind), mixed=False).latents
        for factors, kind in [((1, 1), "none"), ((1, 2), "none"), ((1, 2), "mean"), ((1, 2), "coarse")]
    )
    plain, mean, coarse = (float(((each - dense) ** 2).mean()) for each in rest)
    assert coarse < mean < plain


def test_a_correction_needs_a_dense_step_first() -> None:
    with pytest.raises(ValueError, match="the first step must be dense"):
        on_levels(LEVELS, (2, 2), correction="mean")
    with pytest.raises(ValueError, match="one more than factors"):
        Sizes(levels=(1.0, 0.0), factors=(1, 1))


def test_errors_of_latents_are_nothing_for_the_same_and_split_off_the_layout(bench: Bench) -> None:
    from benchmarks.lab.judging import _latent_errors

    made = sample(bench, Variant(config=JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=1)))
    assert made.latents is not None
    same = _latent_errors(made, made, 0)
    moved = dataclasses.replace(made, latents=made.latents + 0.1)
    noisy = dataclasses.replace(made, latents=made.latents + 0.1 * np.resize([1.0, -1.0], made.latents.shape))
    power = float((made.latents**2).mean())
    assert set(same.values()) == {0.0}
    assert [*_latent_errors(moved, made, 0).values()] == pytest.approx([0.01 / power] * 2, rel=1e-3)
    assert [*_latent_errors(noisy, made, 0).values()] == pytest.approx([0.01 / power, 0.0], rel=1e-3, abs=1e-9)


def test_a_search_for_levels_takes_presets_and_dense_steps_alone() -> None:
    options = argparse.Namespace(budget=[], levels_of=["dpm:6", "7x"])
    (dense, own), (preset, pooled) = search._searches(options, {})
    assert (dense, preset) == ("levels of dpm:6", "levels of 7x")
    assert {config.steps for config in own.values()} == {6} and {*own} <= {*pooled, "alpha 1.4, beta 0.425"}
    for wrong in ("dense:6", "firstblock:28:0.2"):
        with pytest.raises(CommandError, match="--levels-of"):
            next(search._searches(argparse.Namespace(budget=[], levels_of=[wrong]), {}))
