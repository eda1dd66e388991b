"""`jitaccel generate` for video models: clips, and the tokens that each stage computed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jitaccel.errors import CommandError
from jitaccel.evaluation.clips import latent_of, token_sheet, write_clip
from jitaccel.generation.stats import Stats

Command = Callable[..., tuple[int, str, str]]
SIZE = ("--frames", 9, "--size", "96x128", "--max-sequence-length", 16, "--prompt", "a lake", "--steps", 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.every_model import wan_transformer
    from tests.support.video import text_pipeline

    folder = tmp_path_factory.mktemp("wan")
    text_pipeline(wan_transformer(in_channels=16, out_channels=16)).save_pretrained(folder)
    return folder


def frames_of(path: Path) -> list[Image.Image]:
    clip = Image.open(path)
    frames = []
    for index in range(getattr(clip, "n_frames", 1)):
        clip.seek(index)
        frames.append(clip.convert("RGB"))
    return frames


def test_clip_and_the_tokens_of_its_stages_are_written(command: Command, model: Path, tmp_path: Path) -> None:
    out, tokens = tmp_path / "new" / "clip.gif", tmp_path / "tokens.png"
    call = ("generate", "--model", model, *SIZE, "--preset", "7x-paper", "--out", out, "--tokens", tokens, "--stats")
    status, said, _ = command(*call)
    assert status == 0
    assert f"{out}: 128x96, 9 frames, 0.6 s at 16 fps, preset 7x-paper" in said
    assert "grid 3x6x8, 16 text tokens" in said
    # The model's own levels: UniPC's with flow_shift 3, not those of the paper's preset.
    assert " 0.9232 " in said  # after a fifth of the way: 3 x 0.8002 / (1 + 2 x 0.8002)
    frames = frames_of(out)
    assert len(frames) == 9 and {frame.size for frame in frames} == {(128, 96)}
    # Three stages of three frames of latents each, with gaps and labels.
    assert Image.open(tokens).size == (8 + 3 * 136, 22 + 3 * 126 + 8)


def test_speed_is_asked_for_at_the_size_of_the_clip(command: Command, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "clip.gif"
    call = ("generate", "--model", model, *SIZE[:-2], "--preset", "auto", "--target-ms", 1e6, "--out", out, "--stats")
    status, said, error = command(*call)
    assert status == 0, error
    assert "auto: 50 steps at densities 0.32, 1" in said and "measured with 16 text tokens: 46 tokens" in said
    assert "grid 3x6x8" in said and len(frames_of(out)) == 9


def test_tokens_may_be_a_clip(command: Command, model: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.gif"
    call = ("generate", "--model", model, *SIZE, "--out", tmp_path / "clip.gif", "--tokens", tokens)
    assert command(*call)[0] == 0
    frames = frames_of(tokens)
    assert len(frames) == 9 and frames[0].size == (8 + 2 * 136, 22 + 126 + 8)


def test_frames_of_latents_are_found() -> None:
    assert [latent_of(i, 9, 3) for i in range(9)] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert latent_of(80, 81, 21) == 20 and latent_of(0, 1, 1) == 0


def test_sheet_dims_what_was_left_out() -> None:
    import torch

    from jitaccel.generation.stats import StepStats
    from jitaccel.method.presets import PRESETS

    step = StepStats(
        index=0, stage=0, noise_level=1.0, next_level=0.0, tokens=3, calls=1, flops=1, network_s=0.0, outside_s=0.0
    )
    stats = Stats(
        codebase="", execution="", notes=(), config=PRESETS["7x-paper"], generations=1, grid=(2, 2, 2), steps=(step,),
        anchors=(torch.tensor([[0, 5, 6]]),),
    )  # fmt: skip
    sheet = np.asarray(token_sheet(np.zeros((5, 32, 32, 3)), stats))
    cells = [
        [bool(sheet[44 + 16 * (k // 2) + 8, 8 + 40 * frame + 16 * (k % 2) + 8, 0] == 0) for k in range(4)]
        for frame in (0, 1)
    ]
    assert cells == [[True, False, False, False], [False, True, True, False]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", "a.png"), "--out must end in one of .mp4, .mkv, .mov, .webm, .gif for WanPipeline, got 'a.png'"),
        (("--out", "a.gif", "--fps", 0), "--fps must be in 1..120, got 0"),
        (("--out", "a.gif", "--frames", 0), "--frames must be at least 1, got 0"),
        (("--out", "a.gif", "--true-cfg", 3), "--true-cfg must be left out for WanPipeline"),
        (("--out", "a.gif", "--size", "96x100"), "--size must be multiples of 16 pixels"),
        (("--out", "a.gif", "--tokens", "b.png", "--preset", "none"), "--tokens must come with a preset"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    command: Command, model: Path, arguments: tuple[object, ...], words: str
) -> None:
    status, _, err = command("generate", "--model", model, "--prompt", "a", *arguments)
    last = err.strip().splitlines()[-1]
    assert status == 2 and last.startswith("jitaccel generate: ") and words in last


def test_picture_model_takes_no_frames(command: Command, tmp_path: Path) -> None:
    given = ("--prompt", "a lake", "--out", tmp_path / "a.png", "--frames", 9)
    status, _, err = command("generate", *given)
    assert status == 2 and "--frames must come with a video model, got a FluxPipeline" in err


def test_missing_encoder_is_said_before_anything_is_loaded(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "imageio_ffmpeg" else find(name, *rest)
    )
    status, _, err = command("generate", "--model", "/not/there", "--prompt", "a", "--out", "a.mp4")
    assert status == 2 and 'pip install "jitaccel[video]", or write a .gif' in err


def test_ffmpeg_writes_a_clip(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / "a.mp4"
    write_clip([np.full((33, 64, 3), shade) for shade in (0.0, 0.5, 1.0)], path, 8)
    reader = ffmpeg.read_frames(str(path))
    found = next(reader)
    frames = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
    assert found["size"] == (64, 32) and found["fps"] == 8
    assert np.abs(np.array(frames) - [0, 128, 255]).max() < 8


def test_clip_that_ffmpeg_does_not_write_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    with pytest.raises(CommandError, match="must be a clip that ffmpeg writes"):
        write_clip([np.zeros((2, 2, 3))] * 50, tmp_path / "missing" / "a.mp4", 8)
