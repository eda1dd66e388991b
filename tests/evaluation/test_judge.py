"""The judge: what counts as shown, how things are told apart, and how well the one in the box does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jitaccel.api import embedded_model
from jitaccel.evaluation.scenes.draw import cover, draw
from jitaccel.evaluation.scenes.judge import (
    CELLS,
    Judge,
    JudgeNetwork,
    Score,
    Sighting,
    compare,
    components,
    outline_of,
)
from jitaccel.evaluation.scenes.scene import COLOURS, Claim, Thing, describe, random_scene

CIRCLE = Sighting(shape="circle", colour="red", texture="striped", size="large", x=0.3, y=0.6, cells=400)
FULL_CLAIM = Claim(shape="circle", colour="red", texture="striped", size="large", place="left")


def cells_of(x: float, y: float, radius: float, shape: str = "star") -> np.ndarray:
    thing = Thing(shape=shape, colour="red", texture="plain", x=x, y=y, radius=radius, angle=0.0, phase=0.0)
    return cover(thing, CELLS)


def test_everything_claimed_and_shown_counts() -> None:
    score = compare([CIRCLE], [FULL_CLAIM])
    assert score.accuracy == 1.0
    assert score.claimed == dict.fromkeys(("shape", "colour", "texture", "size", "place"), 1)


@pytest.mark.parametrize(
    ("name", "wrong"), [("colour", "blue"), ("texture", "plain"), ("size", "small"), ("place", "right")]
)
def test_one_wrong_attribute_fails_alone(name: str, wrong: str) -> None:
    score = compare([CIRCLE], [dataclasses.replace(FULL_CLAIM, **{name: wrong})])
    assert score.shown.total() == 4 and score.shown[name] == 0


def test_missing_shape_fails_all_that_is_said_of_it() -> None:
    score = compare([CIRCLE], [dataclasses.replace(FULL_CLAIM, shape="star")])
    assert (score.claimed.total(), score.shown.total()) == (5, 0)


def test_silence_claims_nothing() -> None:
    assert compare([CIRCLE], [Claim(shape="circle")]).claimed == {"shape": 1}
    assert Score().accuracy == 1.0


def test_larger_of_two_things_of_a_shape_is_meant() -> None:
    small = dataclasses.replace(CIRCLE, colour="blue", cells=50)
    for order in ([CIRCLE, small], [small, CIRCLE]):
        assert compare(order, [Claim(shape="circle", colour="red")]).accuracy == 1.0


def test_scores_add_up() -> None:
    total = compare([CIRCLE], [FULL_CLAIM]) + compare([], [FULL_CLAIM])
    assert (total.claimed.total(), total.shown.total(), total.accuracy) == (10, 5, 0.5)


def test_outline_is_the_same_at_every_size_and_place() -> None:
    first, second = cells_of(0.3, 0.4, 0.24), cells_of(0.6, 0.7, 0.15)
    outlines = [outline_of(inside.astype(np.float32), inside) for inside in (first, second)]
    assert outlines[0].shape == (24, 24)
    assert np.abs(outlines[0] - outlines[1]).mean() < 0.08
    circle = cells_of(0.3, 0.4, 0.24, "circle")
    assert np.abs(outlines[0] - outline_of(circle.astype(np.float32), circle)).mean() > 0.15


def test_touching_things_of_two_colours_are_two_and_specks_are_none() -> None:
    covered = np.zeros((CELLS, CELLS), bool)
    covered[10:30, 10:50] = True
    covered[50:53, 50:53] = True
    colour = np.zeros((len(COLOURS), CELLS, CELLS), np.float32)
    colour[2, :, :30] = 1.0
    colour[5, :, 30:] = 1.0
    found = [inside.sum() for inside in components(covered, colour)]
    assert found == [400, 400]


def test_judge_survives_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge(JudgeNetwork(), {"note": 1})
    judge.save(tmp_path)
    loaded = Judge.load(tmp_path)
    assert loaded.record == {"note": 1}
    weights = judge.network.state_dict()
    assert all(torch.equal(w.half().float(), loaded.network.state_dict()[k].float()) for k, w in weights.items())


def test_judge_of_other_scenes_is_refused(tmp_path: Path) -> None:
    Judge(JudgeNetwork()).save(tmp_path)
    record = json.loads((tmp_path / "judge.json").read_text())
    record["kinds"]["colour"].append("mauve")
    (tmp_path / "judge.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="train it anew"):
        Judge.load(tmp_path)


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Judge: pictures must be \(B, 256, 256, 3\), got \(1, 128, 128, 3\)"):
        Judge(JudgeNetwork())(np.zeros((1, 128, 128, 3), np.float32))


@pytest.fixture(scope="module")
def judge() -> Judge:
    folder = embedded_model() / "judge"
    if not (folder / "judge.json").is_file():
        pytest.skip(f"no judge in {folder}: run training/judge.py")
    return Judge.load(folder)


def test_embedded_judge_is_right_on_scenes_it_has_not_seen(judge: Judge) -> None:
    rng = np.random.default_rng(20_261_122)
    scenes = [random_scene(rng) for _ in range(40)]
    claims = [describe(scene, rng, detail=1.0)[1] for scene in scenes]
    sightings = judge(np.stack([draw(scene) for scene in scenes]))
    assert sum((compare(s, c) for s, c in zip(sightings, claims, strict=True)), Score()).accuracy > 0.97


def test_embedded_judge_sees_nothing_in_noise_and_takes_bytes_and_floats_alike(judge: Judge) -> None:
    rng = np.random.default_rng(5)
    noise = rng.random((256, 256, 3), np.float32)
    assert judge.score(noise, [FULL_CLAIM]).shown.total() == 0
    picture = draw(random_scene(rng))
    as_bytes = (picture * 255).round().astype(np.uint8)
    floats, whole = judge(picture[None])[0], judge(as_bytes[None])[0]
    assert [(s.shape, s.colour, s.texture) for s in floats] == [(s.shape, s.colour, s.texture) for s in whole]


def test_embedded_judge_is_small_and_says_how_well_it_does(judge: Judge) -> None:
    assert sum(p.numel() for p in judge.network.parameters()) < 500_000
    held_out = judge.record["held_out"]["clean"]
    assert min(rate for rates in held_out.values() for rate in rates.values()) > 0.97
