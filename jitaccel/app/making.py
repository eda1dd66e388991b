"""Makes one picture with several presets, from the same noise, and keeps what a report shows."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..api import apply
from ..method.presets import resolve

if TYPE_CHECKING:
    from ..generation.handle import Handle
    from ..generation.tape import Tape
    from ..view.playback import Decode, FrameBytes, Playback, Previews
    from ..view.underway import Glimpse

AfterStep = Callable[[str, int, int], object]
"""(preset, steps done, total steps), called after each step."""

OnGlimpse = Callable[["Glimpse"], object]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One picture.

    Attributes:
        prompt: The prompt.
        height: In pixels.
        width: In pixels.
        seed: Seed of the noise.
        text_tokens: Prompt length including padding.
        further: Other arguments of the pipeline's call, such as guidance.
    """

    prompt: str
    height: int
    width: int
    seed: int = 0
    text_tokens: int = 512
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class MadePicture:
    """A finished picture. `seconds`: time of the whole pipeline call, without the work for the report."""

    preset: str
    image: Any
    playback: Playback
    seconds: float


def steps_of(preset: str) -> int:
    """Returns the number of steps of a preset."""
    steps = resolve(preset).steps
    assert isinstance(steps, int)  # true for every named preset
    return steps


def make_each(
    pipe: Any,
    presets: Sequence[str],
    wanted: Wanted,
    *,
    on_step: AfterStep | None = None,
    on_glimpse: OnGlimpse | None = None,
    previews: Previews = "auto",
    progress: bool = False,
) -> Iterator[MadePicture]:
    """Yields the picture of each preset when it is finished; between presets the pipeline is unpatched.

    Args:
        pipe: A diffusers text-to-image pipeline.
        presets: Their names.
        wanted: The picture.
        on_step: Called after each step.
        on_glimpse: Called after each step with its pictures, decoded by the pipeline's autoencoder.
        previews: As in `Handle.playback`.
        progress: Whether to show a progress bar for the report's pictures.
    """
    for preset in presets:
        yield _made(pipe, preset, wanted, on_step, on_glimpse, previews, progress)


def _made(
    pipe: Any,
    preset: str,
    wanted: Wanted,
    on_step: AfterStep | None,
    on_glimpse: OnGlimpse | None,
    previews: Previews,
    progress: bool,
) -> MadePicture:
    import torch

    from ..patches.diffusers.decoding import decode_tokens
    from ..view.playback import make_playback

    steps, decode = steps_of(preset), functools.partial(decode_tokens, pipe)
    predicted: dict[int, FrameBytes] = {}
    shown_s = 0.0

    def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal shown_s
        start = time.perf_counter()
        if on_step is not None:
            on_step(preset, index + 1, steps)
        if on_glimpse is not None:
            on_glimpse(_glimpse(handle, preset, steps, decode, predicted))
        shown_s += time.perf_counter() - start
        return {}

    with apply(pipe, resolve(preset)) as handle:
        handle.record()
        start = time.perf_counter()
        image = pipe(
            wanted.prompt,
            height=wanted.height,
            width=wanted.width,
            num_inference_steps=steps,
            max_sequence_length=wanted.text_tokens,
            generator=torch.Generator().manual_seed(wanted.seed),
            callback_on_step_end=after_step,
            **wanted.further,
        ).images[0]
        seconds = time.perf_counter() - start - shown_s
        playback = make_playback(
            _tape_of(handle),
            handle.stats(),
            decode=decode,
            name=preset,
            prompt=wanted.prompt,
            previews=previews,
            progress=progress,
            predicted=predicted,
        )
    return MadePicture(preset=preset, image=image, playback=playback, seconds=seconds)


def _glimpse(handle: Handle, preset: str, steps: int, decode: Decode, predicted: dict[int, FrameBytes]) -> Glimpse:
    """Returns the step just done, and stores its predicted picture."""
    from ..evaluation.pictures import show_stage
    from ..view.playback import predicted_picture
    from ..view.underway import Glimpse

    stats, tape = handle.stats(), _tape_of(handle)
    picture = predicted_picture(tape, decode)
    step = tape.frames[-1].step
    predicted[step.index] = picture
    tokens = show_stage(picture[0], stats, step.stage)[None]
    return Glimpse(preset=preset, steps=steps, stats=stats, predicted=picture, tokens=tokens)


def _tape_of(handle: Handle) -> Tape:
    history = handle.route.history
    assert history is not None and history.tape is not None  # the handle is recording, and a step has run
    return history.tape
