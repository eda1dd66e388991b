"""Guidance of pipelines whose models are cut: token by token, on whole pictures, or unknown.

If guidance weights each token separately, its branches are zero at tokens that are not anchors, and the guided result
is lifted once. If it uses whole pictures (a norm, a standard deviation), each branch is lifted, and the anchors of the
guided result are lifted again.
"""

from __future__ import annotations

from typing import Any

from .caller import argument_of_call

_GUIDERS = ("guider", "ocr_guider")
_SETTINGS = ("guidance_rescale", "_cfg_normalization")
_ARGUMENTS = ("cfg_normalization", "normalize")  # arguments that pipelines do not store
_TOKENWISE = ("ClassifierFreeGuidance",)
_OF_PICTURES = (
    "AdaptiveProjectedGuidance",
    "AdaptiveProjectedMixGuidance",
    "ClassifierFreeZeroStarGuidance",
    "TangentialClassifierFreeGuidance",
)


def guidance_problem(pipeline: Any) -> str | None:
    """Returns which guider of a pipeline is not known to work with the cut; None if all are."""
    known = (*_TOKENWISE, *_OF_PICTURES)
    names = [type(guider).__name__ for guider in _guiders(pipeline)]
    return next((f"an unknown guider ({name})" for name in names if name not in known), None)


def mixes_tokens(pipeline: Any) -> bool:
    """Returns whether guidance in a pipeline's current call uses whole pictures."""
    if any(getattr(pipeline, name, None) for name in _SETTINGS):
        return True
    if pipeline is not None and any(argument_of_call(name) for name in _ARGUMENTS):
        return True
    return any(
        type(guider).__name__ in _OF_PICTURES or getattr(guider, "guidance_rescale", 0.0)
        for guider in _guiders(pipeline)
    )


def _guiders(pipeline: Any) -> list[Any]:
    return [guider for name in _GUIDERS if (guider := getattr(pipeline, name, None)) is not None]
