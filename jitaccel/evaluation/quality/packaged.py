"""Scorers from other packages, each used as its documentation describes. None is imported before it scores."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...provenance import version
from .scorers import Pictures, Scorer

_CLIP = "openai/clip-vit-large-patch14"


def imagereward(device: str) -> Scorer:
    """Returns ImageReward (Xu et al. 2023): how people would rank the picture for its prompt, about -2 to 2."""

    @functools.cache
    def model() -> Any:
        return importlib.import_module("ImageReward").load("ImageReward-v1.0", device=device)

    def score(prompts: Sequence[str], pictures: Pictures, references: Pictures | None) -> list[float]:
        import torch

        with torch.inference_mode():  # its `score` tracks gradients
            return [model().score(text, image) for text, image in zip(prompts, _images(pictures), strict=True)]

    return Scorer(
        name="imagereward", score=score, judges_prompt=True, title="ImageReward", version=version("image-reward")
    )


def hpsv2(device: str) -> Scorer:
    """Returns Human Preference Score v2.1 (Wu et al. 2023): what people would prefer for the prompt, about 0.2 to 0.35.

    The package always uses CUDA if it is present, and loads its checkpoint again at each call, so the pictures of one
    prompt are scored in one call.
    """

    def score(prompts: Sequence[str], pictures: Pictures, references: Pictures | None) -> list[float]:
        package = importlib.import_module("hpsv2")
        found: list[float] = []
        for text, group in groupby(zip(prompts, _images(pictures), strict=True), key=lambda pair: pair[0]):
            found += [float(each) for each in package.score([image for _, image in group], text, hps_version="v2.1")]
        return found

    found = version("hpsv2x") or version("hpsv2")
    return Scorer(name="hpsv2", score=score, judges_prompt=True, title="HPSv2.1", digits=4, version=found)


def clip(device: str) -> Scorer:
    """Returns CLIPScore (Hessel et al. 2021): 100 times the cosine of picture and prompt, or 0 if that is negative.

    Uses OpenAI's ViT-L/14 at 224 pixels. Prompt tokens after the 77th are ignored.
    """

    @functools.cache
    def parts() -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor

        return CLIPModel.from_pretrained(_CLIP).eval().to(device), CLIPProcessor.from_pretrained(_CLIP)

    def score(prompts: Sequence[str], pictures: Pictures, references: Pictures | None) -> list[float]:
        import torch

        model, processor = parts()
        most = model.config.text_config.max_position_embeddings
        settings = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": most}
        texts = processor.tokenizer(list(prompts), **settings).to(device)
        pixels = processor.image_processor(_images(pictures), return_tensors="pt")["pixel_values"].to(device)
        with torch.inference_mode():
            of_texts = model.get_text_features(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"])
            of_images = model.get_image_features(pixel_values=pixels)
            # transformers 5 returns an object with the projected features in this field, 4 the features themselves
            both = [getattr(each, "pooler_output", each).float() for each in (of_texts, of_images)]
            cosines = torch.nn.functional.cosine_similarity(*both)
        return [100.0 * max(value, 0.0) for value in cosines.tolist()]

    return Scorer(name="clip_score", score=score, judges_prompt=True, title="CLIP score", digits=2, version=_CLIP)


def clip_iqa(device: str) -> Scorer:
    """Returns CLIP-IQA (Wang et al. 2023): whether the picture is nearer to "Good photo." than to "Bad photo.", 0 to 1.

    Uses piq, with one picture at a time, as piq requires. Does not look at the prompt.
    """

    @functools.cache
    def model() -> Any:
        return importlib.import_module("piq").CLIPIQA(data_range=255).to(device)

    def score(prompts: Sequence[str], pictures: Pictures, references: Pictures | None) -> list[float]:
        import torch

        with torch.no_grad():
            return [float(model()(_tensor(picture, device))) for picture in pictures]

    return Scorer(name="clip_iqa", score=score, title="CLIP-IQA", version=version("piq"))


def lpips(device: str) -> Scorer:
    """Returns LPIPS (Zhang et al. 2018) to the reference, with AlexNet's features: 0 for the same picture."""

    @functools.cache
    def model() -> Any:
        return importlib.import_module("lpips").LPIPS(net="alex", verbose=False).to(device)

    def score(prompts: Sequence[str], pictures: Pictures, references: Pictures | None) -> list[float]:
        import torch

        assert references is not None
        with torch.no_grad():
            return [
                float(model()(_tensor(own, device) / 127.5 - 1.0, _tensor(other, device) / 127.5 - 1.0))
                for own, other in zip(pictures, references, strict=True)
            ]

    return Scorer(
        name="lpips",
        score=score,
        needs_reference=True,
        higher_is_better=False,
        title="LPIPS",
        version=version("lpips"),
    )


def _images(pictures: Pictures) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(picture) for picture in pictures]


def _tensor(picture: NDArray[Any], device: str) -> Any:
    """Returns a picture as float32 (1, 3, H, W) in [0, 255]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float().to(device)
