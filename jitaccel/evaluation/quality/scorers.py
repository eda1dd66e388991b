"""The metrics of `jitaccel eval --metrics`: built in, from packages, or the user's.

A scorer takes prompts, pictures and, if it needs them, reference pictures, and returns a number for each picture.
Creating one is cheap, because it loads its networks when it scores for the first time.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import suggestion
from . import metrics

Pictures = NDArray[Any]
ScoreFunction = Callable[[Sequence[str], Pictures, Pictures | None], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """One metric. `score(prompts, pictures, references)` returns B numbers; pictures are uint8, (B, H, W, 3).

    Attributes:
        name: Name of its field in a row.
        title: Title of its column.
        needs_reference: Whether it compares with another method's pictures from the same noise; otherwise `references`
            is None.
        judges_prompt: Whether it measures how well a picture shows its prompt.
        higher_is_better: None if the best value lies in between.
        digits: Decimals shown.
        version: Version of its implementation; stored scores of other versions are not reused.
    """

    name: str
    score: ScoreFunction
    needs_reference: bool = False
    judges_prompt: bool = False
    higher_is_better: bool | None = True
    title: str = ""
    digits: int = 3
    version: str | None = None

    def __call__(self, prompts: Sequence[str], pictures: Pictures, references: Pictures | None = None) -> list[float]:
        """Returns a number for each picture. Raises ValueError if the metric returns anything else."""
        if self.needs_reference and references is None:
            raise ValueError(f"{self.name}: references must be given, got none; it compares pictures with them")
        found = self.score(prompts, pictures, references if self.needs_reference else None)
        values = np.asarray(found, np.float64).ravel()
        if len(values) != len(pictures) or np.isnan(values).any():
            raise ValueError(f"{self.name}: score must return {len(pictures)} numbers, got {found!r}")
        return [float(value) for value in values]


@dataclass(frozen=True, kw_only=True)
class ScorerFactory:
    """Creates a scorer. make: called with the name of a torch device. packages: the pip package of each module.

    Each of the modules is imported to test whether it can be; the first one computes the score.
    """

    make: Callable[[str], Scorer]
    packages: Mapping[str, str] | None = None

    def missing(self) -> list[str]:
        """Returns the problems that keep it from running, one sentence each; importing a package may raise anything."""
        found = []
        for module, package in (self.packages or {}).items():
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                top = (error.name or module).partition(".")[0]
                is_own = top == module.partition(".")[0]
                found.append(f"{package} is missing" if is_own else f"{top}, which {package} imports, is missing")
            except Exception as error:
                line = (str(error).strip().splitlines() or ["no reason given"])[0]
                found.append(f"{package} cannot be imported ({type(error).__name__}: {line})")
        return list(dict.fromkeys(found))


def scorer_factory(word: str) -> ScorerFactory:
    """Returns the factory of a scorer: a name of `scorer_factories`, or package.module:attribute for a custom one.

    Raises ValueError for an unknown name, suggesting a similar one.
    """
    known = scorer_factories()
    if word in known:
        return known[word]
    if ":" in word:
        scorer = own(word)
        return ScorerFactory(make=lambda device: scorer)
    hint = suggestion(word, known, "use package.module:attribute for a custom metric")
    raise ValueError(f"one of {', '.join(known)}, got {word!r}; {hint}")


def scorer_factories() -> dict[str, ScorerFactory]:
    """Returns every named metric, those without packages first."""
    from . import packaged

    return {
        "psnr": ScorerFactory(make=lambda device: _PSNR),
        "ssim": ScorerFactory(make=lambda device: _SSIM),
        "spectrum": ScorerFactory(make=lambda device: _SPECTRUM),
        "imagereward": ScorerFactory(make=packaged.imagereward, packages={"ImageReward": "image-reward"}),
        "clip-iqa": ScorerFactory(make=packaged.clip_iqa, packages={"piq": "piq"}),
        "hpsv2": ScorerFactory(make=packaged.hpsv2, packages={"hpsv2": "hpsv2x", "hpsv2.img_score": "hpsv2x"}),
        "clip": ScorerFactory(make=packaged.clip, packages={"transformers": "transformers"}),
        "lpips": ScorerFactory(make=packaged.lpips, packages={"lpips": "lpips"}),
    }


def perceptual(features: Callable[[Pictures], Pictures], version: str | None = None) -> Scorer:
    """Returns the distance between a network's feature maps (B, C, h, w) of pictures and references, 0 to 2."""

    def score(prompts: Sequence[str], pictures: Pictures, references: Pictures | None) -> list[float]:
        assert references is not None
        pairs = zip(features(pictures), features(references), strict=True)
        return [metrics.perceptual_distance(own, other) for own, other in pairs]

    return Scorer(name="perceptual", score=score, needs_reference=True, higher_is_better=False, version=version)


def own(word: str) -> Scorer:
    """Returns a custom scorer, package.module:attribute.

    The attribute is one of these. A Scorer. A function of prompts (list of str) and pictures (uint8, (B, H, W, 3)),
    assumed to judge the prompt and to be better if higher; a third parameter receives reference pictures. A function
    without arguments that returns either; it is called once. Raises ValueError for anything else.
    """
    module_name, _, name = word.partition(":")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"something that can be imported, got {word!r}: {error}; is its folder on PYTHONPATH?"
        ) from error
    if not isinstance(found, Scorer) and callable(found) and _num_arguments(found) == 0:
        found = found()
    if isinstance(found, Scorer):
        return found if found.version is not None else replace(found, version=_digest(module))
    count = _num_arguments(found) if callable(found) else 0
    if count not in (2, 3):
        raise ValueError(
            f"a Scorer, a function of (prompts, pictures) or (prompts, pictures, references), or a factory of one, "
            f"got {word!r}, which is {type(found).__name__}"
        )

    def score(prompts: Sequence[str], pictures: Pictures, references: Pictures | None) -> Any:
        return found(list(prompts), pictures) if count == 2 else found(list(prompts), pictures, references)

    return Scorer(name=word, score=score, needs_reference=count == 3, judges_prompt=True, version=_digest(module))


def _num_arguments(function: Callable[..., Any]) -> int:
    """Returns the number of required positional arguments."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in by_place and each.default is inspect.Parameter.empty for each in parameters)


def _digest(module: ModuleType) -> str | None:
    """Returns a digest of a module's text, so that an edited metric scores again."""
    path = getattr(module, "__file__", None)
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _of_pairs(name: str, title: str, digits: int, compare: Callable[[Pictures, Pictures], float]) -> Scorer:
    def score(prompts: Sequence[str], pictures: Pictures, references: Pictures | None) -> list[float]:
        assert references is not None
        return [compare(own / 255.0, other / 255.0) for own, other in zip(pictures, references, strict=True)]

    return Scorer(
        name=name,
        score=score,
        needs_reference=True,
        higher_is_better=None if name == "spectrum_db" else True,
        title=title,
        digits=digits,
    )


_PSNR = _of_pairs("psnr_db", "PSNR, dB", 1, metrics.psnr_db)
_SSIM = _of_pairs("ssim", "SSIM", 3, metrics.ssim)
_SPECTRUM = _of_pairs("spectrum_db", "detail, dB", 1, metrics.spectrum_error_db)
