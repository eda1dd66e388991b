"""`jitaccel generate` for models that make sound together with their frames."""

from __future__ import annotations

import re
import subprocess
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jitaccel

pytest.importorskip("diffusers")

Command = Callable[..., tuple[int, str, str]]
LENGTH = 2640
"""Samples of the sound of 9 frames at 24 a second: 9 latents, 4 x 9 - 3 rows of a spectrogram, 80 samples each."""
CALL = (
    "generate", "--model", "some/ltx2", "--dtype", "float32", "--device", "cpu", "--prompt", "waves", "--frames", 9,
    "--size", "64x96", "--preset", "dense", "--steps", 2, "--option", "stg_scale=0", "--option", "modality_scale=1",
    "--guidance", 1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    from jitaccel import loading
    from tests.support import ltx2

    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: ltx2.sounding_pipeline())
    monkeypatch.setattr(loading, "picture_sizes", lambda _: None)
    monkeypatch.setattr(loading, "pipeline_class", lambda _: None)


def in_python() -> Any:
    """Returns the sound of the same call in Python, (channels, samples)."""
    import torch

    from tests.support import ltx2

    pipe = ltx2.sounding_pipeline()
    with jitaccel.apply(pipe, "dense", steps=2):
        made = pipe(
            "waves", num_frames=9, height=64, width=96, num_inference_steps=2, guidance_scale=1.0, stg_scale=0,
            modality_scale=1, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    return made.audio[0].detach().numpy()


def of_wav(path: Path) -> tuple[Any, int]:
    """Returns samples (channels, samples) in [-1, 1] and the rate of a .wav of 16 bits."""
    with wave.open(str(path)) as file:
        read = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
        return read.T / 32767, file.getframerate()


def decoded(clip: Path, wav: Path) -> str:
    """Writes a clip's sound as a .wav; returns what ffmpeg says of the clip's streams."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(clip), "-vn", "-c:a", "pcm_s16le", str(wav)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
def test_clip_holds_the_sound(command: Command, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("imageio_ffmpeg")
    out = tmp_path / f"clip{suffix}"
    status, said, error = command(*CALL, "--out", out)
    assert status == 0, error
    assert f"{out}: 96x64, 9 frames, 0.4 s at 24 fps, sound of 0.3 s at 8000 Hz, preset dense" in said
    streams = decoded(out, tmp_path / "sound.wav")
    assert re.search(r"Video: .* 96x64.* 24 fps", streams)
    assert re.search(r"Audio: .* (8000|48000) Hz, stereo", streams)  # Opus, of .webm, is always at 48,000
    samples, rate = of_wav(tmp_path / "sound.wav")
    expected = in_python()
    assert expected.shape == (2, LENGTH)
    assert samples.shape[1] / rate == pytest.approx(LENGTH / 8000, abs=0.15)  # codecs fill their last block
    if suffix != ".webm":
        assert rate == 8000
        assert _correlation(samples, expected) > 0.7


def _correlation(found: Any, expected: Any) -> float:
    """Returns the largest correlation of two sounds over shifts by up to a block of a codec."""
    shifts = range(1200)
    width = min(found.shape[1] - len(shifts), expected.shape[1])
    pairs = ((found[0, shift : shift + width], expected[0, :width]) for shift in shifts)
    return max(float(np.corrcoef(*pair)[0, 1]) for pair in pairs)


def test_sound_lies_next_to_a_gif(command: Command, tmp_path: Path) -> None:
    out, sound = tmp_path / "clip.gif", tmp_path / "clip.wav"
    status, said, error = command(*CALL, "--out", out)
    assert status == 0, error
    assert f"sound of 0.3 s at 8000 Hz in {sound}" in said
    samples, rate = of_wav(sound)
    assert rate == 8000
    np.testing.assert_allclose(samples, in_python(), atol=1e-4)
    status, _, error = command(*CALL, "--out", out.rename(tmp_path / "old.gif").with_name("clip.gif"))
    assert status == 2 and f"--out must not exist, got '{sound}'" in error


def test_frames_a_second_are_those_that_the_sound_is_made_for(command: Command, tmp_path: Path) -> None:
    status, said, error = command(*CALL, "--fps", 12, "--out", tmp_path / "clip.gif")
    assert status == 0, error
    assert "9 frames, 0.8 s at 12 fps, sound of 0.7 s at 8000 Hz" in said
