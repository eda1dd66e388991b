"""What the app does, without the page: checks what was asked for, makes pictures, report and code."""

from __future__ import annotations

import html
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CommandError
from ..loading import EMBEDDED_TEXT_TOKENS, picture_side
from ..view import write_report
from .making import MadePicture, Wanted, make_each, steps_of

ShareDone = Callable[[float, str], object]
"""(share done, in words)."""

_TEXT_TOKENS = 512
_LARGEST_PX = 1536  # of a side, so that one request does not keep others waiting for long
_REPORT_BYTES = 3_000_000


@dataclass(frozen=True, kw_only=True)
class Showing:
    """What the page shows of the presets finished so far.

    Attributes:
        pictures: Files of the pictures with their captions.
        report: The file of the report, once every preset is finished; else None.
        frame: The report as HTML to put into a page; empty until then.
        code: What makes the last preset's picture, in Python.
    """

    pictures: tuple[tuple[str, str], ...]
    report: str | None
    frame: str
    code: str


@dataclass(frozen=True, eq=False)
class Studio:
    """A pipeline, and a folder for what it makes, which each generation empties.

    Attributes:
        pipe: The pipeline.
        model: Its folder or hub id; None for the embedded one.
    """

    pipe: Any
    model: str | None
    _folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)

    @property
    def size(self) -> str:
        """The size that the model was made for."""
        return "{0}x{0}".format(picture_side(self.pipe))

    def generate(
        self, prompt: str, presets: Sequence[str], seed: float, size: str, progress: ShareDone
    ) -> Iterator[Showing]:
        """Yields what to show after each preset; the last time with the report.

        Args:
            prompt: What to show.
            presets: Their names, one or more.
            seed: Of the noise, a whole number.
            size: HEIGHTxWIDTH in pixels.
            progress: Called after each step.

        Raises:
            CommandError: For what cannot be made.
        """
        wanted = self._wanted(prompt, presets, seed, size)
        total, done, made = sum(map(steps_of, presets)), 0, list[MadePicture]()

        def count(preset: str, step: int, steps: int) -> None:
            words = f"{preset}: step {step} of {steps}" if step < steps else f"{preset}: pictures of the report"
            progress((done + step) / total, words)

        files: list[tuple[str, str]] = []
        for each in make_each(self.pipe, presets, wanted, on_step=count):
            done += steps_of(each.preset)
            made.append(each)
            files.append((self._saved(each), self._caption(each)))
            if len(made) < len(presets):
                yield Showing(pictures=tuple(files), report=None, frame="", code=self.code(each.preset, wanted))
        report = write_report(
            Path(self._folder.name) / "report.html", [each.playback for each in made], limit=_REPORT_BYTES
        )
        yield Showing(
            pictures=tuple(files),
            report=str(report),
            frame=framed(report.read_text(encoding="utf-8")),
            code=self.code(presets[-1], wanted),
        )

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
        stats = made.playback.stats
        cost = f"cost {stats.dense_steps:.1f} dense steps"
        return f"{made.preset}: {len(stats.steps)} steps, {cost}, {made.seconds:.1f} s"

    def code(self, preset: str, wanted: Wanted) -> str:
        """Returns a program that makes the picture of a preset."""
        source = "jitaccel.embedded_model()" if self.model is None else repr(self.model)
        return f"""import torch
from diffusers import DiffusionPipeline

import jitaccel

pipe = DiffusionPipeline.from_pretrained({source}, torch_dtype={self.pipe.transformer.dtype})
pipe.to({str(self.pipe.device)!r})
handle = jitaccel.apply(pipe, preset={preset!r}).record()
image = pipe(
    {wanted.prompt!r},
    height={wanted.height},
    width={wanted.width},
    num_inference_steps={steps_of(preset)},
    max_sequence_length={wanted.text_tokens},
    generator=torch.Generator().manual_seed({wanted.seed}),
).images[0]
image.save("picture.png")
handle.report("report.html")
"""


def framed(page: str) -> str:
    """Returns a frame that shows a whole page inside another, and lets it touch nothing of that."""
    style = "width: 100%; height: 80vh; border: 0; border-radius: 8px"
    return f'<iframe sandbox="allow-scripts" title="report" style="{style}" srcdoc="{html.escape(page)}"></iframe>'
