"""Makes one picture by several presets, from the same noise, and keeps what a report shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..api import apply
from ..method.config import JiTConfig
from ..method.presets import resolve

if TYPE_CHECKING:
    from ..view.playback import Playback, Previews

AfterStep = Callable[[str, int, int], object]
"""(preset, steps done, steps) after each step."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One picture.

    Attributes:
        prompt: What to show.
        height: In pixels.
        width: In pixels.
        seed: Of the noise.
        text_tokens: Prompt length with padding.
        further: Arguments of the pipeline, guidance for example.
    """

    prompt: str
    height: int
    width: int
    seed: int = 0
    text_tokens: int = 512
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class MadePicture:
    """A picture, and how it came to be. `seconds`: the pipeline's whole call, without what the report needs."""

    preset: str
    image: Any
    playback: Playback
    seconds: float


def steps_of(preset: str) -> int:
    """Returns how many steps a preset takes."""
    steps = resolve(preset).steps
    assert isinstance(steps, int)  # of every preset that has a name
    return steps


def make_each(
    pipe: Any,
    presets: Sequence[str],
    wanted: Wanted,
    *,
    on_step: AfterStep | None = None,
    previews: Previews = "auto",
    progress: bool = False,
) -> Iterator[MadePicture]:
    """Yields the picture of each preset as it is finished; the pipeline is untouched in between.

    Args:
        pipe: A diffusers text-to-image pipeline.
        presets: Their names.
        wanted: The picture.
        on_step: Called after each step.
        previews: As in `Handle.playback`.
        progress: Whether the report's pictures have a progress bar.
    """
    for preset in presets:
        yield _made(pipe, preset, resolve(preset), wanted, on_step, previews, progress)


def _made(
    pipe: Any,
    preset: str,
    config: JiTConfig,
    wanted: Wanted,
    on_step: AfterStep | None,
    previews: Previews,
    progress: bool,
) -> MadePicture:
    import torch

    steps = steps_of(preset)

    def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(preset, index + 1, steps)
        return {}

    with apply(pipe, config) as handle:
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
        seconds = time.perf_counter() - start
        playback = handle.playback(preset, prompt=wanted.prompt, previews=previews, progress=progress)
    return MadePicture(preset=preset, image=image, playback=playback, seconds=seconds)
