"""The drawn world: landscapes, captions, held-out prompts and drawing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from jitaccel.evaluation.scenes.canvas import REGIONS
from jitaccel.evaluation.scenes.captions import describe, unknown_words, vocabulary
from jitaccel.evaluation.scenes.draw import draw, draw_regions
from jitaccel.evaluation.scenes.prompts import held_out, held_out_landscape, is_held_out, training_landscape
from jitaccel.evaluation.scenes.scene import ATTRIBUTES, NONE, Landscape, random_landscape


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def _shrunk(picture: np.ndarray, factor: int) -> np.ndarray:
    height, width = picture.shape[0] // factor, picture.shape[1] // factor
    return picture.astype(float).reshape(height, factor, width, factor, 3).mean(axis=(1, 3))


def test_every_attribute_value_is_in_its_list(rng: np.random.Generator) -> None:
    for _ in range(200):
        assert all(value in ATTRIBUTES[name] for name, value in random_landscape(rng).attributes().items())


def test_random_landscapes_can_exist(rng: np.random.Generator) -> None:
    for _ in range(500):
        landscape = random_landscape(rng)
        assert (landscape.sky == "starry") <= (landscape.time == "night")
        assert (landscape.thing == "boat") <= (landscape.water != NONE)
        assert (landscape.flowers != NONE) == (landscape.ground == "flowers")
        assert (landscape.light == NONE) == (landscape.light_place == NONE)
        assert landscape.thing != "balloon" or landscape.thing_place != landscape.light_place


def test_caption_claims_only_what_is_drawn(rng: np.random.Generator) -> None:
    for _ in range(200):
        landscape = random_landscape(rng)
        claims = describe(landscape, rng).claims
        assert claims["mountains"] == landscape.mountains
        assert all(landscape.attributes()[name] == value != NONE for name, value in claims.items())


def test_caption_parts_say_what_they_claim(rng: np.random.Generator) -> None:
    for _ in range(100):
        caption = describe(random_landscape(rng), rng, detail=1.0)
        for start, end, claims in caption.parts:
            words = caption.text[start:end]
            colours = [value for name, value in claims.items() if name in ("light", "flowers", "paint")]
            assert all(colour in words for colour in colours)
            assert all(claims[name] in words for name in ("thing", "thing_place", "light_place") if name in claims)


def test_captions_come_in_several_wordings(rng: np.random.Generator) -> None:
    landscape = random_landscape(rng)
    assert len({describe(landscape, rng, detail=1.0).text for _ in range(50)}) > 4


def test_vocabulary_is_all_the_words_of_captions(rng: np.random.Generator) -> None:
    texts = [describe(random_landscape(rng), rng).text for _ in range(1500)]
    assert not unknown_words(" ".join(texts))
    assert {word for text in texts for word in text.replace(",", "").split()} == vocabulary()


def test_unknown_words_are_told_once_in_their_order() -> None:
    assert unknown_words("Snowy mountains at dusk, a Cat's house and a striped, STRIPED boat.") == ["cat's", "striped"]
    assert unknown_words("") == []


def test_held_out_prompts_are_distinct_and_the_first_ones_stay() -> None:
    prompts = held_out(60)
    assert len({text for text, _ in prompts}) == 60 and held_out(20) == prompts[:20]
    assert held_out(20, seed=1) != prompts[:20]


def test_training_never_sees_a_held_out_combination(rng: np.random.Generator) -> None:
    assert not any(is_held_out(training_landscape(rng)) for _ in range(300))
    assert all(is_held_out(held_out_landscape(rng)) for _ in range(50))
    share = np.mean([is_held_out(random_landscape(rng)) for _ in range(2000)])
    assert 0.1 < share < 0.15  # an eighth


def test_draw_is_deterministic_and_the_seed_changes_what_has_no_word(rng: np.random.Generator) -> None:
    landscape = random_landscape(rng)
    picture = draw(landscape, 64)
    assert picture.dtype == np.uint8 and np.array_equal(picture, draw(landscape, 64))
    assert not np.array_equal(picture, draw(replace(landscape, seed=landscape.seed + 1), 64))


def test_every_attribute_changes_the_picture() -> None:
    """Of a landscape with everything in it, another value of any attribute is another picture."""
    whole = Landscape(
        time="dusk", sky="clear", light="golden", light_place="left", mountains="snowy", water="lake", ground="flowers",
        flowers="red", thing="house", paint="blue", thing_place="middle", ranges=2, seed=4,
    )  # fmt: skip
    drawn = draw(whole, 96).astype(int)
    for name, values in ATTRIBUTES.items():
        for value in set(values) - {NONE, getattr(whole, name)}:
            other = draw(replace(whole, **{name: value}), 96)
            assert np.abs(drawn - other).max() > 40, (name, value)


@pytest.mark.parametrize("factor", [2, 4])
def test_a_small_picture_is_the_large_one_shrunk(rng: np.random.Generator, factor: int) -> None:
    for _ in range(4):
        landscape = random_landscape(rng)
        small = draw(landscape, 512 // factor).astype(float)
        assert np.sqrt(np.mean((small - _shrunk(draw(landscape, 512), factor)) ** 2)) < 13  # of 255


@pytest.mark.parametrize("size", [(192, 96), (96, 192), (128, 128)])
def test_draw_fills_wide_and_tall_pictures(rng: np.random.Generator, size: tuple[int, int]) -> None:
    for _ in range(8):
        picture = draw(random_landscape(rng), *size)
        assert picture.shape == (size[1], size[0], 3)
        assert picture.std() > 5


def test_draw_rejects_a_strip(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="width / height must lie in"):
        draw(random_landscape(rng), 512, 64)


def test_regions_cover_each_pixel_once(rng: np.random.Generator) -> None:
    for _ in range(5):
        landscape = random_landscape(rng)
        regions = draw_regions(landscape, 64)
        assert np.allclose(regions.sum(axis=0), 1, atol=1e-4)
        covered = dict(zip(REGIONS, regions.mean(axis=(1, 2)), strict=True))
        assert (covered["thing"] > 0) == (landscape.thing != NONE)
        assert (covered["light"] > 0) == (landscape.light != NONE)
        assert (covered["water"] > 0.02) == (landscape.water != NONE)


def test_a_cloudy_sky_has_clouds(rng: np.random.Generator) -> None:
    cloudy = (each for each in iter(lambda: random_landscape(rng), None) if each.sky == "cloudy")
    for landscape in itertools.islice(cloudy, 60):
        cover = draw_regions(landscape, 64)[REGIONS.index("cloud")]
        assert cover[:20].mean() > 0.02, landscape


def test_claimed_objects_are_not_hidden(rng: np.random.Generator) -> None:
    drawn = 0
    while drawn < 25:
        landscape = random_landscape(rng)
        if landscape.thing != NONE and landscape.light != NONE:
            regions = dict(zip(REGIONS, draw_regions(landscape, 96).sum(axis=(1, 2)) / 96**2, strict=True))
            assert regions["thing"] > 0.008
            assert regions["light"] > 0.004
            drawn += 1
