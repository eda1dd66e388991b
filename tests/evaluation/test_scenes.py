"""The small world: scenes, their captions and pictures, and the prompts that no training sees."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jitaccel.evaluation.scenes.draw import TEXTURE_PERIOD_PX, cover, draw
from jitaccel.evaluation.scenes.prompts import held_out
from jitaccel.evaluation.scenes.scene import (
    COLOURS,
    SHAPES,
    TEXTURES,
    Claim,
    Scene,
    Thing,
    caption,
    describe,
    places_of,
    random_scene,
)


def thing(**changes: object) -> Thing:
    settings: dict[str, object] = {
        "shape": "circle", "colour": "red", "texture": "plain",
        "x": 0.5, "y": 0.5, "radius": 0.22, "angle": 0.0, "phase": 0.0,
    }  # fmt: skip
    return Thing(**{**settings, **changes})  # type: ignore[arg-type]


def test_same_generator_same_scene() -> None:
    assert random_scene(np.random.default_rng(3)) == random_scene(np.random.default_rng(3))


def test_things_of_a_scene_stay_inside_apart_and_differ_in_shape() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        things = random_scene(rng).things
        assert len({t.shape for t in things}) == len(things)
        assert all(t.radius <= min(t.x, t.y, 1 - t.x, 1 - t.y) for t in things)
        if len(things) == 2:
            a, b = things
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_captions_say_what_is_claimed_and_claim_what_is_true() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = random_scene(rng)
        text, claims = describe(scene, rng)
        by_shape = {t.shape: t for t in scene.things}
        assert len(claims) == len(scene.things)
        for claim in claims:
            shown = by_shape[claim.shape]
            for name in ("colour", "texture", "size"):
                said = getattr(claim, name)
                assert said is None or (said == getattr(shown, name) and said in text)
            assert claim.place is None or claim.place in places_of(shown)


def test_caption_reads_like_a_sentence() -> None:
    first = Claim(shape="circle", colour="orange", texture="striped", place="left")
    expected = "an orange striped circle on the left and a small star on a teal background"
    assert caption((first, Claim(shape="star", size="small")), "teal") == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_picture_shows_the_colour_where_the_thing_covers_it(shape: str) -> None:
    drawn = thing(shape=shape, colour="blue")
    picture = draw(Scene(background="black", light=0.0, things=(drawn,)), 64)
    inside = cover(drawn, 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.float32
    assert picture.min() >= 0.0 and picture.max() <= 1.0
    assert np.abs(picture[inside].mean(axis=0) - COLOURS["blue"]).max() < 0.1
    assert picture[~inside].mean() < 0.12  # its edge is anti-aliased


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_keep_their_period_in_pixels_at_every_size(texture: str) -> None:
    changes = {}
    for size in (128, 256):
        drawn = thing(texture=texture, shape="square", radius=0.25)
        row = draw(Scene(background="gray", light=0.0, things=(drawn,)), size)[size // 2, :, 0]
        inside = row[int(0.32 * size) : int(0.68 * size)]
        changes[size] = int((np.abs(np.diff(inside > inside.mean()))).sum()) / len(inside)
    assert changes[128] == pytest.approx(changes[256], abs=0.06)
    if texture == "striped":
        assert changes[256] == pytest.approx(2 / TEXTURE_PERIOD_PX, abs=0.03)


def test_held_out_prompts_are_distinct_and_the_first_ones_stay() -> None:
    prompts = held_out(60)
    assert len({text for text, _ in prompts}) == 60
    assert held_out(20) == prompts[:20]
    assert held_out(20, seed=1) != prompts[:20]


def test_held_out_prompts_are_hardly_ever_captions_of_the_training_stream() -> None:
    rng = np.random.default_rng([0, 0])  # training/transformer.py's, of its first worker
    seen = {describe(random_scene(rng), rng)[0] for _ in range(800)}
    pairs = {text for text, claims in held_out(150) if len(claims) == 2}
    assert len(pairs) > 80
    assert not seen & pairs
