"""The app: a Gradio page around `Studio`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from jitaccel.app.studio import Studio
from jitaccel.errors import CommandError, ConfigError, NonFiniteVelocityError, UnsupportedModelError
from jitaccel.method.presets import PRESETS

_EXPECTED = (CommandError, ConfigError, NonFiniteVelocityError, UnsupportedModelError)
_PROMPT = "autumn mountains at dawn with a meadow with yellow flowers, a yellow balloon on the left and the sea"
_PROGRESS = gr.Progress()  # as a default, by which Gradio knows where to put the request's own
_ABOUT = (
    "# jitaccel\nThe same prompt by several presets, from the same noise. The report's slider shows, step by step, "
    "which tokens ran."
)


def build(studio: Studio) -> gr.Blocks:
    """Returns the page; `launch()` serves it. One generation runs at a time, others wait in a queue.

    Args:
        studio: What makes the pictures.
    """
    with gr.Blocks(title="jitaccel", delete_cache=(3600, 3600)) as page:
        gr.Markdown(_ABOUT)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                prompt = gr.Textbox(_PROMPT, label="Prompt", lines=2)
                presets = gr.CheckboxGroup(list(PRESETS), value=["dense", "7x"], label="Presets")
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                    size = gr.Textbox(studio.size, label="Size (height x width)")
                button = gr.Button("Generate", variant="primary")
            with gr.Column(scale=2):
                pictures = gr.Gallery(label="Pictures", columns=2, object_fit="contain", height="auto")
        with gr.Tab("Steps and tokens"):
            report = gr.HTML()
        with gr.Tab("Downloads and code"):
            files = gr.File(label="Report and pictures", file_count="multiple", interactive=False)
            code = gr.Code(language="python", label="As code", interactive=False)

        def generate(
            prompt: str, presets: list[str], seed: float, size: str, progress: gr.Progress = _PROGRESS
        ) -> Iterator[tuple[Any, ...]]:
            try:
                for shown in studio.generate(prompt, presets, seed, size, lambda share, words: progress(share, words)):
                    made = [path for path, _ in shown.pictures]
                    saved = None if shown.report is None else [shown.report, *made]
                    yield list(shown.pictures), shown.frame, saved, shown.code
            except _EXPECTED as error:
                raise gr.Error(str(error)) from error

        inputs, outputs = [prompt, presets, seed, size], [pictures, report, files, code]
        for event in (button.click, prompt.submit):
            event(generate, inputs, outputs, concurrency_limit=1, concurrency_id="pipeline", api_name="generate")
    page.queue(default_concurrency_limit=1)
    return page
