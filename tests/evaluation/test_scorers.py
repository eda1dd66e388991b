"""The metrics of packages, each tested with a stand-in that has the package's interface."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from jitaccel.evaluation.quality import packaged
from jitaccel.evaluation.quality.scorers import Scorer, scorer_factory

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)
REFERENCES = PICTURES[::-1].copy()
PROMPTS = ["one", "one", "two"]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> None:
    module = ModuleType(name)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)


def scorer_of(word: str) -> Scorer:
    factory = scorer_factory(word)
    assert factory.missing() == []
    return factory.make("cpu")


def test_imagereward_scores_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    class Model:
        weight = nn.Parameter(torch.ones(()))

        def score(self, prompt: str, image: Any) -> float:
            assert isinstance(image, Image.Image) and image.size == (48, 32)
            reward = self.weight * (len(prompt) + np.asarray(image)[0, 0, 0] / 1000)
            assert not reward.requires_grad
            return float(reward.detach().cpu().numpy().item())

    def load(name: str = "ImageReward-v1.0", device: str = "cuda") -> Model:
        loaded.append((name, device))
        return Model()

    stand_in(monkeypatch, "ImageReward", load=load)
    scorer = scorer_of("imagereward")
    assert loaded == [] and scorer.judges_prompt and not scorer.needs_reference
    assert scorer(PROMPTS, PICTURES) == pytest.approx(3 + PICTURES[:, 0, 0, 0] / 1000)
    scorer(PROMPTS, PICTURES)
    assert loaded == [("ImageReward-v1.0", "cpu")]


def test_hpsv2_scores_the_pictures_of_one_prompt_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, str]] = []

    def score(imgs_path: Any, prompt: str, hps_version: str = "v2.0") -> list[Any]:
        assert isinstance(imgs_path, list) and all(isinstance(image, Image.Image) for image in imgs_path)
        calls.append((prompt, len(imgs_path), hps_version))
        return [np.float16(0.25) for _ in imgs_path]

    stand_in(monkeypatch, "hpsv2", score=score, __path__=[])
    stand_in(monkeypatch, "hpsv2.img_score")
    assert scorer_of("hpsv2")(PROMPTS, PICTURES) == [0.25] * 3
    assert calls == [("one", 2, "v2.1"), ("two", 1, "v2.1")]


def test_clip_iqa_scores_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    class CLIPIQA(nn.Module):
        def __init__(self, data_range: float = 1.0) -> None:
            super().__init__()
            self.data_range = float(data_range)

        def forward(self, x_input: torch.Tensor) -> torch.Tensor:
            assert x_input.shape == (1, 3, 32, 48) and x_input.max() > 1
            return (x_input / self.data_range).mean(dim=(1, 2, 3))[:, None]

    stand_in(monkeypatch, "piq", CLIPIQA=CLIPIQA)
    scorer = scorer_of("clip-iqa")
    assert not scorer.judges_prompt
    assert scorer(PROMPTS, PICTURES) == pytest.approx(PICTURES.mean(axis=(1, 2, 3)) / 255, rel=1e-5)


def test_lpips_compares_in_minus_one_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class LPIPS(nn.Module):
        def __init__(self, pretrained: bool = True, net: str = "vgg", verbose: bool = True) -> None:
            super().__init__()
            assert net == "alex" and not verbose

        def forward(self, in0: torch.Tensor, in1: torch.Tensor) -> torch.Tensor:
            assert in0.min() >= -1 and in0.max() <= 1 and in0.min() < -0.9
            return (in0 - in1).abs().mean(dim=(1, 2, 3), keepdim=True)

    stand_in(monkeypatch, "lpips", LPIPS=LPIPS)
    scorer = scorer_of("lpips")
    assert scorer.needs_reference and scorer.higher_is_better is False
    expected = np.abs(PICTURES.astype(float) - REFERENCES).mean(axis=(1, 2, 3)) / 127.5
    assert scorer(PROMPTS, PICTURES, REFERENCES) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="references must be given"):
        scorer(PROMPTS, PICTURES)


def test_clip_is_the_cosine_that_transformers_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    from tests.support import tiny

    tokens = tiny.pipeline().tokenizer
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokens), "max_position_embeddings": 12, "bos_token_id": tokens.bos_token_id,
            "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}  # fmt: skip
    vision = {**size, "image_size": 24, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    transformers.CLIPProcessor(image_processor=images, tokenizer=tokens).save_pretrained(tmp_path)
    monkeypatch.setattr(packaged, "_CLIP", str(tmp_path))
    prompts = ["a red circle", "a red circle", " ".join(["blue square"] * 20)]
    scores = scorer_of("clip")(prompts, PICTURES)
    pixels = images([Image.fromarray(picture) for picture in PICTURES], return_tensors="pt")["pixel_values"]
    ids = tokens(prompts[:1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        together = model(input_ids=ids, pixel_values=pixels)
    cosines = (together.image_embeds * together.text_embeds).sum(dim=1)
    assert scores[:2] == pytest.approx([100 * max(float(value), 0.0) for value in cosines[:2]], abs=1e-3)
    assert len(scores) == 3 and any(scores)


def test_packages_that_cannot_be_imported_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ImageReward", "lpips", "piq"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "ImageReward.py").write_text("import clip_that_is_not_there")
    (tmp_path / "lpips.py").write_text("raise RuntimeError('made for another torch')")
    (tmp_path / "piq.py").write_text("from json import no_such_name")
    assert scorer_factory("imagereward").missing() == ["clip_that_is_not_there, which image-reward imports, is missing"]
    assert scorer_factory("lpips").missing() == ["lpips cannot be imported (RuntimeError: made for another torch)"]
    assert "piq cannot be imported (ImportError" in scorer_factory("clip-iqa").missing()[0]


def test_built_in_metrics_compare_with_the_reference() -> None:
    psnr, ssim, spectrum = (scorer_of(word) for word in ("psnr", "ssim", "spectrum"))
    assert psnr(PROMPTS, PICTURES, PICTURES) == [float("inf")] * 3
    assert ssim(PROMPTS, PICTURES, PICTURES) == pytest.approx([1.0] * 3)
    assert spectrum(PROMPTS, PICTURES, PICTURES) == pytest.approx([0.0] * 3)
    grey = np.full_like(PICTURES, 100)
    assert psnr(PROMPTS, grey, grey + 51) == pytest.approx([20 * np.log10(5)] * 3)


def test_own_scorer_of_a_factory_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "scorers_of_mine.py").write_text(
        "from jitaccel.evaluation.quality.scorers import Scorer\n"
        "def darkness():\n"
        "    score = lambda prompts, pictures, references: [1.0] * len(pictures)\n"
        "    return Scorer(name='dark', higher_is_better=False, score=score)\n"
    )
    scorer = scorer_factory("scorers_of_mine:darkness").make("cpu")
    assert (scorer.name, scorer.judges_prompt, scorer.version is None) == ("dark", False, False)
    assert scorer(PROMPTS, PICTURES) == [1.0] * 3
