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
_ABOUT = (
    "# jitaccel\nOne prompt, several presets, the same noise. While a picture is made you see each step; afterwards a "
    "report with a slider over the steps shows what the model predicted and which tokens ran."
)


def build(studio: Studio) -> gr.Blocks:
    """Returns the page; `launch()` serves it. One generation runs at a time; others wait in a queue.

    Args:
        studio: Makes the pictures.
    """
    with gr.Blocks(title="jitaccel", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(_ABOUT)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                prompt = gr.Textbox(_PROMPT, label="Prompt", lines=3)
                presets = gr.CheckboxGroup(
                    list(PRESETS),
                    value=["dense", "7x"],
                    label="Presets",
                    info="dense is the reference: 50 steps on all tokens, the slowest.",
                )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                    size = gr.Textbox(studio.size, label="Size (height x width)")
                button = gr.Button("Generate", variant="primary")
            with gr.Column(scale=2):
                pictures = gr.Gallery(
                    label="Pictures", columns=2, fit_columns=False, object_fit="contain", height="auto"
                )
        with gr.Tab("Steps and tokens"):
            steps = gr.HTML()
        with gr.Tab("Downloads and code"):
            files = gr.File(label="Report and pictures", file_count="multiple", interactive=False)
            code = gr.Code(language="python", label="These settings as code", interactive=False)

        def generate(prompt: str, presets: list[str], seed: float, size: str) -> Iterator[tuple[Any, ...]]:
            num_pictures = -1
            try:
                for shown in studio.generate(prompt, presets, seed, size):
                    made = [path for path, _ in shown.pictures]
                    saved = None if shown.report is None else [shown.report, *made]
                    is_new = len(made) > num_pictures
                    num_pictures = len(made)
                    yield list(shown.pictures) if is_new else gr.skip(), shown.steps, saved, shown.code
            except _EXPECTED as error:
                raise gr.Error(str(error), print_exception=False) from error

        inputs, outputs = [prompt, presets, seed, size], [pictures, steps, files, code]
        for event in (button.click, prompt.submit):
            event(
                generate,
                inputs,
                outputs,
                concurrency_limit=1,
                concurrency_id="pipeline",
                api_name="generate",
                show_progress="minimal",
            )
    page.queue(default_concurrency_limit=1)
    return page
