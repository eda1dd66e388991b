"""Picture metrics, intervals and significance tests, against closed forms and against human perception."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from jitaccel.evaluation.quality.metrics import (
    frechet_distance,
    perceptual_distance,
    seam_ratio,
    spectrum_error_db,
    ssim,
)
from jitaccel.evaluation.quality.statistics import bootstrap, mean_of, paired_p_value, share_of

RNG = np.random.default_rng(0)


def picture(seed: int = 0, side: int = 64) -> np.ndarray:
    """Smooth with some texture."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.random((side, side, 3)), (4, 4, 0))
    return np.clip((smooth - smooth.min()) / np.ptp(smooth) + 0.05 * rng.standard_normal((side, side, 3)), 0, 1)


def test_ssim_is_one_for_the_same_and_falls_with_noise_and_blur() -> None:
    from scipy.ndimage import gaussian_filter

    one = picture()
    noisy = [np.clip(one + s * np.random.default_rng(1).standard_normal(one.shape), 0, 1) for s in (0.02, 0.1, 0.3)]
    values = [ssim(each, one) for each in (one, *noisy)]
    assert values[0] == pytest.approx(1.0) and values == sorted(values, reverse=True)
    assert ssim(gaussian_filter(one, (2, 2, 0)), one) < 0.9
    assert ssim(one, noisy[1]) == pytest.approx(ssim(noisy[1], one))
    black, white = np.zeros((16, 16, 3)), np.ones((16, 16, 3))
    assert ssim(black, white) == pytest.approx(1e-4 / (1 + 1e-4), rel=1e-6)  # closed form of two flat pictures


def test_spectrum_error_has_the_sign_and_the_size_of_what_was_done() -> None:
    from scipy.ndimage import gaussian_filter

    one = picture()
    assert spectrum_error_db(one, one) == 0.0
    assert spectrum_error_db(0.5 * one, one) == pytest.approx(20 * np.log10(0.5))
    assert spectrum_error_db(gaussian_filter(one, (1, 1, 0)), one) < -6
    assert spectrum_error_db(one + 0.2 * RNG.standard_normal(one.shape), one) > 6


def test_seams_are_told_from_edges_that_stages_do_not_know() -> None:
    stages = np.zeros((8, 8), int)
    stages[2:5, 3:7] = 1
    smooth = np.full((64, 64, 3), 0.5)
    assert seam_ratio(smooth, stages) == pytest.approx(1.0)
    stepped = smooth + 0.1 * np.kron(stages, np.ones((8, 8)))[..., None]
    assert seam_ratio(stepped, stages) > 100
    noisy = smooth + 0.1 * RNG.standard_normal(smooth.shape)
    assert seam_ratio(noisy, stages) == pytest.approx(1.0, abs=0.1)
    assert seam_ratio(stepped, np.zeros((8, 8), int)) == 1.0
    oblong = np.zeros((4, 8), int)
    oblong[1] = 1
    assert seam_ratio(np.kron(oblong, np.ones((8, 4)))[..., None].repeat(3, 2), oblong) > 100


def test_perceptual_distance_is_half_the_squared_distance_of_directions() -> None:
    features = RNG.standard_normal((6, 4, 5))
    assert perceptual_distance(features, 3.0 * features) == pytest.approx(0.0, abs=1e-12)
    assert perceptual_distance(features, -features) == pytest.approx(2.0)
    one, other = np.zeros((2, 1, 1)), np.zeros((2, 1, 1))
    one[0], other[1] = 1.0, 1.0
    assert perceptual_distance(one, other) == pytest.approx(1.0)


@pytest.mark.parametrize(("n", "m", "width"), [(40, 30, 5), (6, 50, 12), (5, 4, 20)])
def test_frechet_distance_is_the_formula(n: int, m: int, width: int) -> None:
    x, y = RNG.standard_normal((n, width)), 0.5 + 2.0 * RNG.standard_normal((m, width))
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(np.trace(sqrtm(first @ second + 0j)))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_one_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 2 pictures or more, got 1 and 3"):
        frechet_distance(np.zeros((1, 4)), np.zeros((3, 4)))


def test_interval_of_a_mean_is_the_one_that_is_known_and_covers_it() -> None:
    values = np.random.default_rng(3).standard_normal(400)
    made = mean_of(values)
    half = 1.96 * values.std() / 20
    assert made.value == pytest.approx(values.mean())
    assert (made.low, made.high) == (
        pytest.approx(values.mean() - half, abs=0.02),
        pytest.approx(values.mean() + half, abs=0.02),
    )
    hits = sum(
        m.low <= 0.0 <= m.high
        for m in (mean_of(np.random.default_rng(k).standard_normal(60), seed=k) for k in range(100))
    )
    assert 87 <= hits <= 99
    assert mean_of(values, seed=1) == mean_of(values, seed=1)


def test_share_weighs_prompts_by_what_they_claim() -> None:
    made = share_of(np.array([1, 0, 9]), np.array([2, 4, 10]))
    assert made.value == pytest.approx(10 / 16) and made.low < made.value < made.high
    assert bootstrap(3, lambda chosen: float(len(chosen))).overlaps(bootstrap(3, lambda chosen: 3.0))
    assert not mean_of(np.zeros(9)).overlaps(mean_of(np.ones(9)))


def test_paired_test_finds_what_pairs_show_and_nothing_where_there_is_nothing() -> None:
    rng = np.random.default_rng(5)
    prompts = rng.standard_normal(80)  # how hard each prompt is: the same for both methods
    noise = 0.2 * rng.standard_normal((2, 80))
    assert paired_p_value(prompts + noise[0] + 0.2, prompts + noise[1]) < 0.001
    assert paired_p_value(prompts + noise[0], prompts + noise[1]) > 0.01
    assert paired_p_value(prompts, prompts) == 1.0
