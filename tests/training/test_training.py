"""Training of the embedded model: pictures, latents, levels, and every step at small size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jitaccel.evaluation.scenes.canvas import REGIONS
from jitaccel.evaluation.scenes.draw import draw, draw_regions
from jitaccel.evaluation.scenes.judge import CELL_VALUES, PICTURE_PX, Judge
from jitaccel.evaluation.scenes.prompts import held_out
from jitaccel.evaluation.scenes.scene import NONE, random_landscape

pytest.importorskip("diffusers")

from training.assemble import assemble, save
from training.card import write_card
from training.decoder import new_autoencoder, train_decoder, write_encoder
from training.judge import cell_shares, spoil, train_judge
from training.log import TrainingLog
from training.patch_encoder import encode, patch_features
from training.pictures import NUM_LABELS, PictureSet, SetSize, draw_sets
from training.preview import judged, preview
from training.text import train_text
from training.transformer import Phase, random_levels, train_transformer


def test_picture_set_gives_sizes_of_the_same_pictures(tmp_path: Path) -> None:
    draw_sets(tmp_path, workers=1, sets=(SetSize(width=64, height=64, count=3),))
    pictures = PictureSet(tmp_path, "64x64")
    numbers = np.array([0, 2])
    whole, half = pictures.pictures(numbers), pictures.pictures(numbers, rows=4)
    assert whole.shape == (2, 3, 64, 64) and half.shape == (2, 3, 32, 32)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(whole, 2), half)
    drawn = draw(pictures.landscape(2), 64)
    assert np.array_equal(((whole[1] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), drawn)


def test_labels_share_each_token_among_the_regions(tmp_path: Path) -> None:
    draw_sets(tmp_path, workers=1, sets=(SetSize(width=64, height=64, count=2),))
    labels = PictureSet(tmp_path, "64x64").labels(np.array([0, 1]))
    assert labels.shape == (2, 64, NUM_LABELS)
    assert (labels.sum(dim=2) - 1).abs().max() < 0.03


def test_patch_features_hardly_lose_anything_of_a_drawing() -> None:
    picture = torch.from_numpy(draw(random_landscape(np.random.default_rng(2)), 128)).permute(2, 0, 1)[None] / 127.5 - 1
    filters = patch_features()
    inverse = torch.linalg.pinv(filters.flatten(1)).T.reshape(filters.shape)
    back = torch.nn.functional.conv_transpose2d(encode(picture), inverse, stride=4)
    assert -10 * torch.log10((back - picture).square().mean() / 4) > 28


def test_autoencoder_encodes_what_the_closed_form_does() -> None:
    vae = new_autoencoder()
    write_encoder(vae)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    with torch.no_grad():
        latents = vae.encode(picture).latent_dist.mode()
    torch.testing.assert_close(latents, encode(picture), atol=0.02, rtol=0)


def test_levels_cover_the_top_at_every_size() -> None:
    torch.manual_seed(0)
    for tokens in (256, 1024):
        levels = random_levels(4000, tokens)
        assert levels.min() >= 0 and levels.max() <= 1
        assert (levels > 0.9).float().mean() > 0.2
        assert (levels < 0.3).float().mean() > 0.05


def test_cells_show_what_stands_in_them() -> None:
    landscape = next(
        each for each in map(random_landscape, map(np.random.default_rng, range(50))) if each.thing != NONE
    )
    regions = torch.from_numpy(draw_regions(landscape, 64))
    shown = dict(zip(CELL_VALUES, cell_shares(landscape, regions), strict=True))
    assert torch.equal(shown["thing", landscape.thing], regions[REGIONS.index("thing")])
    assert torch.equal(shown["paint", landscape.paint], regions[REGIONS.index("thing")])
    seen = {(name, value) for (name, value), share in shown.items() if share.any()}
    assert seen <= {*landscape.attributes().items()}


def test_spoilt_pictures_are_other_pictures_of_the_same() -> None:
    picture = torch.from_numpy(draw(random_landscape(np.random.default_rng(1)), PICTURE_PX)).permute(2, 0, 1) / 255
    spoilt = spoil(picture.expand(6, -1, -1, -1), np.random.default_rng(0))
    assert spoilt.min() >= 0 and spoilt.max() <= 1
    errors = (spoilt - picture).square().mean(dim=(1, 2, 3)).sqrt()
    assert errors.min() > 1e-3 and errors.max() < 0.15 and len({round(float(error), 6) for error in errors}) == 6


def test_log_writes_means_and_the_rest_when_it_is_closed(tmp_path: Path) -> None:
    for first in (0, 3):  # the second run takes the first one up
        log = TrainingLog(tmp_path / "log.jsonl", every=2)
        for update in range(first, first + 3):
            log.add(update, loss=float(update))
        log.close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["updates"], row["loss"]) for row in rows] == [(2, 0.5), (3, 2.0), (4, 3.0), (6, 4.5)]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder after all steps of the training, on a few drawings and for an update or two each."""
    folder = tmp_path_factory.mktemp("run")
    sizes = (SetSize(width=256, height=256, count=4), SetSize(width=192, height=128, count=2))
    draw_sets(folder / "pictures", workers=1, sets=sizes)
    train_text(folder / "text", updates=2, num_captions=300)
    for name, start in (("small", None), ("guided", folder / "small")):
        phase = Phase(shares={"16x16": 0.5, "16x24": 0.5}, updates=2, batch_tokens=512, warmup_updates=1, guidance=2.5)
        train_transformer(folder / name, phase, start)
    train_decoder(folder, updates=2, num_pictures=6)
    train_judge(folder, updates=2, num_held_out=2, num_drawn=3)
    return folder


def test_steps_of_the_training_make_a_model_with_its_card(run: Path, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    judge = Judge.load(run / "judge")
    assert judge.drawn is not None and len(judge.drawn) == 3
    assert {"128 px", "256 px", "256 px, spoilt", "256 px, decoded", "512 px"} < judge.record["held_out"].keys()
    save(assemble(run / "text", run / "vae", run / "guided" / "ema"), tmp_path)
    pipe = FluxPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 128, "width": 192, "max_sequence_length": 40, "num_inference_steps": 2}
    picture = pipe(held_out(1)[0][0], generator=torch.Generator().manual_seed(0), **call).images[0]
    assert picture.size == (192, 128) and np.asarray(picture).std() > 1
    logs = [run / "text" / "text.jsonl", run / "vae.jsonl", run / "judge" / "judge.jsonl"]
    (tmp_path / "faults.md").write_text("Houses lean.\n")
    phases = [run / "small", run / "guided"]
    write_card(tmp_path, pipe.transformer, judge, {256: 33.3}, phases, logs, tmp_path / "faults.md")
    card = (tmp_path / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| 2 |")]
    assert len(rows) == 5  # the last update of each curve
    for words in (
        "33.3 dB at 256 px",
        "Houses lean.",
        "12,000 of 256x256",
        "One in 8",
        "guidance 2.5",
        "| thing_place |",
    ):
        assert words in card, words


def test_a_phase_goes_on_where_it_stopped(run: Path) -> None:
    folder = run / "small"
    before = torch.load(folder / "last.pt", weights_only=True)
    phase = Phase(shares={"16x16": 1.0}, updates=3, batch_tokens=256, warmup_updates=1)
    train_transformer(folder, phase)
    after = torch.load(folder / "last.pt", weights_only=True)
    assert (before["update"], after["update"]) == (2, 3)
    changed = [not torch.equal(weight, after["learner"][name]) for name, weight in before["learner"].items()]
    assert any(changed) and before["learner"].keys() == after["learner"].keys()
    assert [json.loads(line)["updates"] for line in (folder / "log.jsonl").read_text().splitlines()] == [2, 3]


def test_preview_draws_a_phase_and_judges_it(run: Path) -> None:
    texts, claims = zip(*held_out(2), strict=True)
    pictures = preview(run, "guided", texts, tokens=(8, 12), steps=2, guidance=1.5, seed=0)
    assert pictures.shape == (2, 64, 96, 3)
    found = judged(Judge.load(run / "judge"), pictures, claims)
    assert found["claimed"] == sum(map(len, claims)) and 0 <= float(str(found["shown"])) <= 1
