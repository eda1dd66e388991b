"""Writes clips, and shows which tokens of a video each stage computed, as a sheet of frames or as a clip."""

from __future__ import annotations

import importlib.util
import tempfile
import wave
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import CommandError
from ..files import whole
from ..method.grid import num_tokens_of
from .pictures import Pixels, grid_picture, show_active, show_pooled, to_bytes

if TYPE_CHECKING:
    from ..generation.sound import Sound
    from ..generation.stats import Stats

ENCODED = (".mp4", ".mkv", ".mov", ".webm")
SUFFIXES = (*ENCODED, ".gif")
_MOST_COLUMNS = 8  # frames that a sheet shows


def require_encoder(path: Path) -> None:
    """Raises CommandError if a package needed to write a clip of this name is missing. A GIF needs none."""
    if path.suffix.lower() in ENCODED and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise CommandError(
            f"imageio-ffmpeg must be installed to write {path.suffix} clips, got none; "
            f'pip install "jitaccel[video]", or write a .gif'
        )


def write_clip(frames: Iterable[Pixels], path: Path, fps: float, sound: Sound | None = None) -> Path:
    """Writes frames as a clip: .gif with Pillow, others with ffmpeg.

    Args:
        frames: (h, w, 3) each, floats in [0, 1] or uint8.
        path: The file.
        fps: Frames per second.
        sound: Sound of the clip. For a .gif, which has none, it is written next to it as .wav.

    Returns:
        The file with the sound: `path`, or the .wav next to a .gif.

    Raises:
        CommandError: If ffmpeg is missing or fails.
    """
    require_encoder(path)
    pictures = [_of_even_sides(to_bytes(frame)) for frame in frames]
    with whole(path) as partial:
        if path.suffix.lower() == ".gif":
            first, *others = (Image.fromarray(picture) for picture in pictures)
            first.save(partial, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
        elif problem := _encode(pictures, partial, fps, sound):
            raise CommandError(f"{path} must be a clip that ffmpeg writes, got {problem}; write a .gif")
    if path.suffix.lower() != ".gif" or sound is None:
        return path
    with whole(path.with_suffix(".wav")) as partial:
        write_sound(sound, partial)
    return path.with_suffix(".wav")


def write_sound(sound: Sound, path: Path) -> None:
    """Writes sound as a .wav with 16 bits per sample."""
    samples = np.asarray(sound.samples.detach().float().cpu() if hasattr(sound.samples, "detach") else sound.samples)
    levels = (np.nan_to_num(samples).clip(-1.0, 1.0) * 32767.0).round().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(levels))
        file.setsampwidth(levels.itemsize)
        file.setframerate(sound.rate)
        file.writeframes(levels.T.tobytes())


def _encode(pictures: Sequence[Pixels], path: Path, fps: float, sound: Sound | None) -> str:
    """Writes pictures with ffmpeg; returns why that failed, or "" if it succeeded."""
    import imageio_ffmpeg

    height, width = pictures[0].shape[:2]
    problem = ""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"fps": fps, "macro_block_size": 2}
        is_webm = path.suffix.lower() == ".webm"
        if is_webm:  # which holds no H.264
            settings |= {"codec": "libvpx-vp9", "quality": None, "output_params": ["-crf", "31", "-b:v", "0"]}
        if sound is not None:
            write_sound(sound, Path(folder) / "sound.wav")
            settings |= {
                "audio_path": str(Path(folder) / "sound.wav"),
                "audio_codec": "libopus" if is_webm else "aac",
            }
        writer = imageio_ffmpeg.write_frames(str(path), (width, height), **settings)
        try:
            writer.send(None)
            for picture in pictures:
                writer.send(np.ascontiguousarray(picture))
        except (OSError, RuntimeError, StopIteration) as error:
            problem = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        finally:
            writer.close()
    if problem or not path.is_file():
        return problem or "no file"
    try:
        return "" if imageio_ffmpeg.count_frames_and_secs(str(path))[0] else "no frames"
    except RuntimeError:
        return "a file without frames"


def _of_even_sides(picture: Pixels) -> Pixels:
    """Returns a picture with even sides, which codecs need; an odd last row or column is dropped."""
    return picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]


def latent_of(frame: int, num_frames: int, num_latents: int) -> int:
    """Returns the index of the latent frame from which a frame of a video is decoded.

    Video autoencoders encode the first frame alone into the first latent, and equally many frames into each other one.
    """
    return 0 if frame == 0 else 1 + (frame - 1) * (num_latents - 1) // (num_frames - 1)


def show_frame(frame: Pixels, stats: Stats, stage: int, latent: int, video: int = 0) -> Pixels:
    """Returns a frame of a video as a stage showed it to the network, uint8; tokens that were left out are dimmed.

    Args:
        frame: (h, w, 3).
        stats: Statistics of the generation.
        stage: Index of the stage.
        latent: Index of the latent frame from which the frame is decoded.
        video: Index of the video in the batch.
    """
    if (factor := stats.config.pooling_of(stage)) > 1:
        return show_pooled(frame, factor)
    size = num_tokens_of(stats.grid[1:])
    at: Any = stats.anchors[stage][video].cpu().numpy() - latent * size
    return show_active(frame, at[(at >= 0) & (at < size)], stats.grid[1:])


def stage_labels(stats: Stats) -> list[str]:
    """Returns a line for each stage with its steps and its number of tokens."""
    labels = []
    for stage in range(len(stats.anchors)):
        steps = [step for step in stats.steps if step.stage == stage]
        ends = dict.fromkeys((steps[0].index, steps[-1].index))
        when = f"step{'s' if len(ends) == 2 else ''} {'-'.join(map(str, ends))}"
        labels.append(f"{when}: {steps[0].tokens} of {num_tokens_of(stats.grid)} tokens")
    return labels


def token_sheet(frames: Pixels, stats: Stats) -> Image.Image:
    """Returns one picture of a video (T, h, w, 3): a row for each stage, a column for each latent frame.

    If there are more than eight latent frames, eight are shown, evenly spread.
    """
    count, latents = len(frames), stats.grid[0]
    spread = np.linspace(0, latents - 1, min(latents, _MOST_COLUMNS)).round().astype(int)
    shown = [(k, next(i for i in range(count) if latent_of(i, count, latents) == k)) for k in spread.tolist()]
    rows = [[show_frame(frames[i], stats, stage, latent) for latent, i in shown] for stage in range(len(stats.anchors))]
    return grid_picture(rows, [f"frame {i}" for _, i in shown], stage_labels(stats))


def token_frames(frames: Pixels, stats: Stats) -> list[Pixels]:
    """Returns the frames of a clip that shows the stages of a video (T, h, w, 3) side by side."""
    count, latents = len(frames), stats.grid[0]
    labels = stage_labels(stats)
    return [
        np.asarray(
            grid_picture(
                [[show_frame(frame, stats, k, latent_of(i, count, latents)) for k in range(len(labels))]], labels, [""]
            )
        )
        for i, frame in enumerate(frames)
    ]
