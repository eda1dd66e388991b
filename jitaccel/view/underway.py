"""A step of a running generation, as HTML inside another page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..method.grid import num_tokens_of
from .contents import costs_of, described
from .encoding import encoded
from .playback import FrameBytes
from .templates import template

if TYPE_CHECKING:
    from ..generation.stats import Stats

_BYTES = 300_000


@dataclass(frozen=True, eq=False, kw_only=True)
class Glimpse:
    """The last step of a running generation.

    Attributes:
        preset: Name of the preset.
        steps: Number of steps of the generation.
        stats: Statistics of the steps done.
        predicted: (1, h, w, 3), the picture that the step predicts.
        tokens: The same picture as the network saw it: tokens that did not run are dimmed, or the picture is smaller.
    """

    preset: str
    steps: int
    stats: Stats
    predicted: FrameBytes
    tokens: FrameBytes


def underway_html(glimpse: Glimpse, share: float) -> str:
    """Returns a step as HTML with inline styles.

    Args:
        glimpse: The step.
        share: Overall progress, in [0, 1].
    """
    stats, step = glimpse.stats, glimpse.stats.steps[-1]
    cost = costs_of(stats, stats.steps)[-1]
    kind, _, factor = stats.shown(step.stage).partition(" ")
    total = num_tokens_of(stats.grid)
    ran = {
        "dense": f"all {total} tokens",
        "subset": f"{step.tokens} of {total} tokens",
        "pooled": f"{step.tokens} tokens, {described(kind, int(factor or 1))}",
    }[kind]
    words = (
        f"step {step.index + 1} of {glimpse.steps} · noise level {step.noise_level:.3f} → {step.next_level:.3f} · "
        f"{ran} · cost so far {cost:.2f} dense steps"
    )
    uris = encoded([glimpse.predicted, glimpse.tokens], [False, False], _BYTES)
    pictures = zip(("Predicted picture", "Tokens that ran"), uris, strict=True)
    return template("underway.html.j2").render(preset=glimpse.preset, words=words, share=share, pictures=pictures)
