"""Sound that pipelines of diffusers (LTX-2) make together with their frames."""

from __future__ import annotations

import inspect

from jitaccel.generation.sound import Sound

from ..foreign import Pipeline


def makes_sound(kind: type) -> bool:
    """Returns whether pipelines of a class make sound: they have a vocoder."""
    return "vocoder" in inspect.signature(kind).parameters


def sound_of(pipeline: Pipeline, made: object, video: int = 0) -> Sound | None:
    """Returns the sound of one of the videos that a pipeline returned; None where it makes none.

    made: the pipeline's own output, no tuple.
    """
    audio, vocoder = getattr(made, "audio", None), getattr(pipeline, "vocoder", None)
    if audio is None or vocoder is None:
        return None
    return Sound(samples=audio[video], rate=int(vocoder.config.output_sampling_rate))
