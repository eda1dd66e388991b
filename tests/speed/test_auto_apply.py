"""`preset="auto"` of `apply`, and of the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import jitaccel
from jitaccel import ConfigError
from jitaccel.cli import main
from jitaccel.method.presets import DENSE_STEPS, PRESETS
from jitaccel.speed.cost import loop_seconds
from tests.support import pipelines, tiny
from tests.support.timing import AUTO, Clock


def test_auto_is_the_same_as_applying_what_it_chose(pipe: Any, ticking: Callable[[Any], Clock]) -> None:
    ticking(pipe.transformer)
    untouched = tiny.generate(pipe, num_inference_steps=4)
    with jitaccel.apply(pipe, target_speedup=6.0, **AUTO, micro_flow="exact") as handle:
        assert handle.choice is not None
        assert handle.config == handle.choice.config and handle.config.micro_flow == "exact"
        assert "auto: " in repr(handle) and "predicted" in repr(handle)
        made = tiny.generate(pipe)
        assert len(handle.stats().steps) == handle.config.steps
    assert torch.equal(tiny.generate(pipe, num_inference_steps=4), untouched)
    with jitaccel.apply(pipe, handle.config) as again:
        assert again.choice is None and "auto" not in repr(again)
        assert torch.equal(tiny.generate(pipe), made)


def test_a_speed_in_place_of_a_preset_is_the_keywords_in_one_value(
    pipe: Any, ticking: Callable[[Any], Clock]
) -> None:
    ticking(pipe.transformer)
    with jitaccel.apply(pipe, target_speedup=6.0, **AUTO) as handle:
        expected = handle.config
    wanted = jitaccel.Auto(speedup=6.0, **{name: value for name, value in AUTO.items() if name != "preset"})
    with jitaccel.apply(pipe, wanted, micro_flow="exact") as handle:
        assert handle.choice is not None
        assert handle.config == expected.replace(micro_flow="exact")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({}, "Auto: one of speedup and ms must be given, got none"),
        ({"speedup": 4.0, "ms": 4.0}, "Auto: one of speedup and ms must be given, got both"),
        ({"speedup": 1}, "Auto: speedup must be a finite number above 1, got 1"),
        ({"ms": float("nan")}, "Auto: ms must be a finite number above 0, got nan"),
        ({"speedup": 10**400}, "Auto: speedup must be a finite number above 1"),
    ],
)
def test_speed_that_is_none_is_refused(target: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        jitaccel.Auto(**target)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"target_ms": 3.0}, 'target_ms must be left out unless preset="auto", got 3.0; set it in Auto'),
        ({"size": (48, 48)}, "size must be left out"),
        ({"steps": 4}, "steps must be left out"),
        ({"noise_levels": (1.0, 0.0)}, "noise_levels must be left out"),
    ],
)
def test_what_does_not_go_with_a_speed_is_refused(pipe: Any, more: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        jitaccel.apply(pipe, jitaccel.Auto(speedup=6.0), **more)
    assert jitaccel.handle_of(pipe) is None


def test_prediction_is_what_the_loop_takes(pipe: Any, ticking: Callable[[Any], Clock]) -> None:
    clock = ticking(pipe.transformer)
    handle = jitaccel.apply(pipe, target_ms=1000.0, **AUTO)
    assert handle.choice is not None
    start = clock.now
    tiny.generate(pipe)
    assert 1000 * (clock.now - start) == pytest.approx(handle.choice.predicted_ms)
    assert handle.choice.predicted_ms <= 1000.0


def test_embedded_model_reaches_its_target_in_steps(ticking: Callable[[Any], Clock]) -> None:
    pipe = diffusers.FluxPipeline.from_pretrained(jitaccel.embedded_model())
    pipe.set_progress_bar_config(disable=True)
    ticking(pipe.transformer)
    call = {"height": 128, "width": 128, "max_sequence_length": 48, "output_type": "latent", "return_dict": False}

    def make() -> torch.Tensor:
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **call)[0]

    cost = loop_seconds(PRESETS["7x"], 256, float)
    target_speedup = 0.999 * DENSE_STEPS * 256 / cost
    with jitaccel.apply(pipe, "auto", target_speedup=target_speedup, size=(128, 128), text_tokens=48):
        made = make()
    with jitaccel.apply(pipe, "7x"):
        assert torch.equal(make(), made)


def test_what_may_run_dense_does_where_it_is_not_measured(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipelines.flux_pipeline("FluxKontextPipeline")
    handle = jitaccel.apply(pipe, "auto", target_speedup=6.0, on_unsupported="dense")
    assert handle.choice is None and "runs dense" in caplog.text
    assert any("auto_config" in note for note in handle.stats().notes)


@pytest.mark.parametrize("target", ["--target-speedup=2", "--target-ms=1e6"])
def test_generate_measures_and_says_what_it_chose(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "a.png"
    status = main([
        "generate", "--model", str(tmp_path / "model"), "--prompt", "a", "--preset", "auto", target, "--size=48x48",
        "--max-sequence-length=8", "--out", str(out), "--stats",
    ])  # fmt: skip
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "auto: " in said.out and "predicted" in said.out and out.exists()
    assert "timing steps: 100%" in said.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset=auto"], "one of --target-speedup and --target-ms must be given"),
        (["--preset=auto", "--target-ms=5", "--steps=5"], "--steps must be left out with --preset auto"),
        (["--preset=auto", "--target-speedup=1"], "above 1, got 1.0; use --preset dense for 1"),
        (["--target-ms=5"], "--target-ms must come with --preset auto, got --preset 7x"),
        (["--preset=none", "--target-speedup=5"], "--target-speedup must come with --preset auto"),
    ],
)
def test_generate_refuses_bad_targets_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["generate", "--prompt", "a", "--out", str(tmp_path / "a.png"), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.strip().splitlines()) == 1
