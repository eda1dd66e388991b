"""The judge: what counts as shown, what is saved with it, and the accuracy of the embedded one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jitaccel.api import embedded_model
from jitaccel.errors import CommandError
from jitaccel.evaluation.judging import judge_folder, load_judge
from jitaccel.evaluation.scenes.captions import describe
from jitaccel.evaluation.scenes.draw import draw
from jitaccel.evaluation.scenes.judge import (
    CELL_VALUES,
    NUM_FEATURES,
    UNSURE,
    Judge,
    JudgeNetwork,
    Score,
    compare,
    split_by_attribute,
)
from jitaccel.evaluation.scenes.prompts import held_out_landscape
from jitaccel.evaluation.scenes.scene import ATTRIBUTES, Landscape

SEEN = {
    "time": "dusk", "sky": "clear", "light": "red", "light_place": "left", "mountains": "snowy", "water": "lake",
    "ground": "flowers", "flowers": "purple", "thing": "boat", "paint": "white", "thing_place": "right",
}  # fmt: skip


def test_everything_claimed_and_seen_counts() -> None:
    score = compare(SEEN, SEEN)
    assert score.accuracy == 1.0 and score.claimed == dict.fromkeys(ATTRIBUTES, 1)


@pytest.mark.parametrize(
    ("name", "wrong"), [("time", "dawn"), ("light", "white"), ("light_place", UNSURE), ("flowers", "red")]
)
def test_one_wrong_attribute_fails_alone(name: str, wrong: str) -> None:
    score = compare({**SEEN, name: wrong}, SEEN)
    assert score.shown.total() == 10 and score.shown[name] == 0


def test_a_missing_thing_fails_in_all_that_is_said_of_it() -> None:
    score = compare({**SEEN, "thing": "none"}, SEEN)
    assert {name for name in ATTRIBUTES if not score.shown[name]} == {"thing", "paint", "thing_place"}
    assert compare({**SEEN, "thing": "house"}, {"paint": "white"}).accuracy == 1.0  # if the thing is not claimed


def test_silence_claims_nothing_and_scores_add_up() -> None:
    assert Score().accuracy == 1.0 and compare(SEEN, {}).claimed == {}
    total = compare(SEEN, {"time": "dusk"}) + compare(SEEN, {"time": "dawn", "sky": "clear"})
    assert (total.claimed.total(), total.shown.total()) == (3, 2)


@pytest.fixture
def untrained() -> Judge:
    torch.manual_seed(0)
    return Judge(JudgeNetwork(), {"note": 1}, np.random.default_rng(0).random((3, NUM_FEATURES), np.float32))


def test_judge_survives_saving(untrained: Judge, tmp_path: Path) -> None:
    untrained.save(tmp_path)
    loaded = Judge.load(tmp_path)
    assert loaded.record == {"note": 1} and loaded.drawn is not None and untrained.drawn is not None
    assert np.abs(loaded.drawn - untrained.drawn).max() < 1e-3
    weights, others = untrained.network.state_dict(), loaded.network.state_dict()
    assert all(torch.equal(w.half().float(), others[name].float()) for name, w in weights.items())


def test_judge_of_another_world_is_refused(untrained: Judge, tmp_path: Path) -> None:
    untrained.save(tmp_path / "judge")
    record = json.loads((tmp_path / "judge" / "judge.json").read_text())
    record["attributes"]["paint"].append("mauve")
    (tmp_path / "judge" / "judge.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="train it again"):
        Judge.load(tmp_path / "judge")
    with pytest.raises(CommandError, match="train it again"):
        load_judge(str(tmp_path))


def test_a_model_is_judged_where_a_judge_lies_with_it(untrained: Judge, tmp_path: Path) -> None:
    assert judge_folder(str(tmp_path)) is None and load_judge(str(tmp_path)) is None
    untrained.save(tmp_path / "judge")
    loaded = load_judge(str(tmp_path))
    assert judge_folder(str(tmp_path)) == tmp_path / "judge" and loaded is not None and loaded.record == {"note": 1}


@pytest.mark.parametrize("size", [128, 256, 512])
def test_judge_takes_any_size_bytes_and_floats(untrained: Judge, size: int) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (2, size, size, 3), np.uint8)
    features = untrained.features(pictures)
    assert features.shape == (2, NUM_FEATURES, 32, 32)
    assert np.allclose(features, untrained.features(pictures / np.float32(255)), atol=1e-5)
    assert [set(seen) for seen in untrained(pictures)] == [set(ATTRIBUTES)] * 2


def test_network_answers_each_attribute_and_tells_cells(untrained: Judge) -> None:
    with torch.no_grad():
        answers, cells = untrained.network.read(untrained.network.features(torch.rand(2, 3, 64, 96)))
    assert {name: scores.shape[1] for name, scores in split_by_attribute(answers).items()} == {
        name: len(values) for name, values in ATTRIBUTES.items()
    }
    assert cells.shape == (2, len(CELL_VALUES), 8, 12)


@pytest.fixture(scope="module")
def judge() -> Judge:
    found = load_judge()
    if found is None:
        pytest.skip(f"no judge in {embedded_model()}: run `python -m training judge`")
    return found


@pytest.fixture(scope="module")
def landscapes() -> list[Landscape]:
    rng = np.random.default_rng(20_261_129)  # drawings that neither its training nor its record has
    return [held_out_landscape(rng) for _ in range(24)]


@pytest.mark.parametrize("size", [256, 512])
def test_embedded_judge_is_right_on_drawings_it_has_not_seen(
    judge: Judge, landscapes: list[Landscape], size: int
) -> None:
    seen = judge(np.stack([draw(landscape, size) for landscape in landscapes]))
    right = [seen[k][name] == value for k, each in enumerate(landscapes) for name, value in each.attributes().items()]
    assert np.mean(right) > 0.97


def test_embedded_judge_tells_a_caption_from_one_of_another_landscape(
    judge: Judge, landscapes: list[Landscape]
) -> None:
    rng = np.random.default_rng(3)
    pictures = [draw(landscape, 256) for landscape in landscapes[:12]]
    claims = [describe(landscape, rng, detail=1.0).claims for landscape in landscapes[:12]]
    own = sum((judge.score(picture, said) for picture, said in zip(pictures, claims, strict=True)), Score())
    turned = [*claims[1:], claims[0]]
    other = sum((judge.score(picture, said) for picture, said in zip(pictures, turned, strict=True)), Score())
    assert own.accuracy > 0.95 and other.accuracy < 0.6


def test_embedded_judge_is_small_and_says_how_well_it_does(judge: Judge) -> None:
    assert sum(p.numel() for p in judge.network.parameters()) < 1_000_000
    assert judge.drawn is not None and judge.drawn.shape == (512, NUM_FEATURES)
    held_out = judge.record["held_out"]
    for kind in ("256 px", "512 px", "256 px, decoded"):
        assert held_out[kind]["all"] > 0.98, kind
