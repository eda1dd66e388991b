"""The app without its page: checks the input, makes pictures, report and code."""

from __future__ import annotations

import html
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CommandError
from ..loading import EMBEDDED_TEXT_TOKENS, picture_side
from ..view import write_report
from ..view.underway import Glimpse, underway_html
from .making import MadePicture, Wanted, make_each, steps_of
from .threads import yield_from_thread

GlimpseOrPicture = Glimpse | MadePicture

_TEXT_TOKENS = 512
_LARGEST_PX = 1536  # longest side, so that one request does not block others for long
_REPORT_BYTES = 3_000_000


@dataclass(frozen=True, kw_only=True)
class Showing:
    """The content of the page.

    Attributes:
        steps: HTML of the step in progress; at the end, of the report.
        pictures: Files of the finished pictures, with captions.
        report: The report's file once every preset is finished; otherwise None.
        code: Python code that makes the pictures.
    """

    steps: str
    pictures: tuple[tuple[str, str], ...] = ()
    report: str | None = None
    code: str = ""


@dataclass(frozen=True, eq=False)
class Studio:
    """A pipeline and an output folder, which each generation empties.

    Attributes:
        pipe: The pipeline.
        model: Its folder or hub id; None for the embedded one.
        offload: How it was loaded, one of `loading.OFFLOADS`.
    """

    pipe: Any
    model: str | None
    offload: str = "none"
    _folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)

    @property
    def size(self) -> str:
        """The size the model was made for."""
        return "{0}x{0}".format(picture_side(self.pipe))

    def generate(self, prompt: str, presets: Sequence[str], seed: float, size: str) -> Iterator[Showing]:
        """Yields what to show after each step and each preset, and finally the report.

        The pictures are made in a separate thread, which ends when this generator is closed.

        Args:
            prompt: The prompt.
            presets: One or more names.
            seed: Seed of the noise, a whole number.
            size: HEIGHTxWIDTH in pixels.

        Raises:
            CommandError: For invalid input.
        """
        wanted = self._wanted(prompt, presets, seed, size)
        total, done, made = sum(map(steps_of, presets)), 0, list[MadePicture]()

        def work(hand_over: Callable[[GlimpseOrPicture], None]) -> None:
            for each in make_each(self.pipe, presets, wanted, on_glimpse=hand_over):
                hand_over(each)

        shown = Showing(steps="")
        for each in yield_from_thread(work):
            if isinstance(each, Glimpse):
                share = (done + len(each.stats.steps)) / total
                shown = replace(shown, steps=underway_html(each, share))
            else:
                done += steps_of(each.preset)
                made.append(each)
                shown = replace(shown, pictures=(*shown.pictures, (self._saved(each), self._caption(each))))
            yield shown
        report = write_report(
            Path(self._folder.name) / "report.html", [each.playback for each in made], limit=_REPORT_BYTES
        )
        frame = framed(report.read_text(encoding="utf-8"))
        yield replace(shown, steps=frame, report=str(report), code=self.code(presets, wanted))

    def _wanted(self, prompt: str, presets: Sequence[str], seed: float, size: str) -> Wanted:
        if not prompt.strip():
            raise CommandError("the prompt must say what to show, got nothing")
        if not presets:
            raise CommandError("presets must be one or more, got none")
        if not 0 <= seed < 2**63 or seed != int(seed):
            raise CommandError(f"the seed must be a whole number from 0, got {seed}")
        unit = 2 * self.pipe.vae_scale_factor
        sides = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", size)
        height, width = (int(side) for side in sides.groups()) if sides else (0, 0)
        if not all(unit <= side <= _LARGEST_PX and side % unit == 0 for side in (height, width)):
            raise CommandError(
                f"the size must be HEIGHTxWIDTH, multiples of {unit} up to {_LARGEST_PX}, got {size!r}; try {self.size}"
            )
        length = EMBEDDED_TEXT_TOKENS if self.model is None else _TEXT_TOKENS
        return Wanted(prompt=prompt.strip(), height=height, width=width, seed=int(seed), text_tokens=length)

    def _saved(self, made: MadePicture) -> str:
        path = Path(self._folder.name) / f"{made.preset}.png"
        made.image.save(path)
        return str(path)

    def _caption(self, made: MadePicture) -> str:
        return f"{made.preset}: {len(made.playback.stats.steps)} steps, {made.seconds:.1f} s"

    def code(self, presets: Sequence[str], wanted: Wanted) -> str:
        """Returns a program that makes the pictures of these presets, with a report of each."""
        source = "jitaccel.embedded_model()" if self.model is None else repr(self.model)
        place = {
            "none": f"pipe.to({str(self.pipe.device)!r})",
            "model": "pipe.enable_model_cpu_offload()",
            "sequential": "pipe.enable_sequential_cpu_offload()",
        }[self.offload]
        return f"""import torch
from diffusers import DiffusionPipeline

import jitaccel

pipe = DiffusionPipeline.from_pretrained({source}, torch_dtype={self.pipe.transformer.dtype})
{place}
prompt = {wanted.prompt!r}
for preset, steps in {[(preset, steps_of(preset)) for preset in presets]}:
    with jitaccel.apply(pipe, preset=preset) as handle:
        handle.record()
        image = pipe(
            prompt,
            height={wanted.height},
            width={wanted.width},
            num_inference_steps=steps,
            max_sequence_length={wanted.text_tokens},
            generator=torch.Generator().manual_seed({wanted.seed}),
        ).images[0]
        image.save(f"{{preset}}.png")
        handle.report(f"{{preset}}.html", prompt=prompt)
"""


def framed(page: str) -> str:
    """Returns an iframe that shows a whole page inside another one, isolated from it."""
    style = "width: 100%; height: 80vh; border: 0; border-radius: 8px"
    return f'<iframe sandbox="allow-scripts" title="report" style="{style}" srcdoc="{html.escape(page)}"></iframe>'
