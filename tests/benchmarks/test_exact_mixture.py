"""The exact laboratory's mixture of fields: its network is the conditional mean, on all tokens and on a subset."""

from __future__ import annotations

import pytest
import torch

from benchmarks.lab.exact import questions, report
from benchmarks.lab.exact.mixture import Mixture, in_tokens
from jitaccel.method.config import JiTConfig

SMALL = Mixture(side=12, per_side=2)


def drawn(mixture: Mixture, which: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    values, vectors = mixture.spectra
    units = torch.randn(count, len(values[which]), generator=generator, dtype=torch.float64)
    return ((units * values[which].sqrt()) @ vectors[which].T).unflatten(1, (-1, 4))


def test_map_of_a_picture_is_found() -> None:
    for which in range(4):
        assert (SMALL.map_of(drawn(SMALL, which, 8)) == which).all()


def test_every_token_as_anchor_is_all_tokens() -> None:
    seen = torch.randn(3, 36, 4, generator=torch.Generator().manual_seed(1))
    every = torch.arange(36).expand(3, -1)
    for level in (0.3, 0.9):
        assert torch.allclose(SMALL.clean(seen, level, every), SMALL.clean(seen, level), atol=1e-10)


def test_one_map_makes_the_network_linear_and_several_do_not() -> None:
    noisy = torch.randn(2, 36, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mixture, is_linear in ((Mixture(side=12, per_side=1), True), (SMALL, False)):
        alone = mixture.clean(noisy, 0.4)
        assert torch.allclose(mixture.clean(2.0 * noisy, 0.4), 2.0 * alone, atol=1e-9) == is_linear


@pytest.mark.parametrize("anchors", [None, torch.arange(0, 36, 2)])
def test_network_has_the_least_error(anchors: torch.Tensor | None) -> None:
    """Any other multiple of its result, and the mean for a single map, are worse on average."""
    clean = torch.cat([drawn(SMALL, which, 16) for which in range(4)])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = None if anchors is None else anchors.expand(len(clean), -1)
    seen, known = ((1 - 0.5) * clean + 0.5 * noise, clean)
    if anchors is not None:
        seen, known = seen[:, anchors], known[:, anchors]
    found = SMALL.clean(seen, 0.5, rows)
    error = (found - known).square().mean()
    assert error < 0.6 * (seen - known).square().mean()
    assert all(error < (share * found - known).square().mean() for share in (0.9, 1.1))


def test_tokens_are_two_by_two_latents() -> None:
    assert in_tokens(torch.arange(16.0).view(1, 4, 4))[0].tolist()[1] == [2.0, 3.0, 6.0, 7.0]


def test_dense_run_nears_the_exact_end() -> None:
    noise = SMALL.noise(2, 0)
    end = SMALL.end(noise)
    config = JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=4, solver="dpmpp_2m")
    few, many = (SMALL.run(each, noise) for each in (config, config.replace(steps=30, alpha=0.6, beta=0.4)))
    assert (many - end).square().mean() < 0.1 * (few - end).square().mean()


def test_activation_rows_compare_with_random() -> None:
    rows = [row.fields for row in questions.activation(SMALL, count=2)]
    assert [row["activated_by"] for row in rows[:4]][0::3] == ["random", "truth"] and len(rows) == 8
    assert all((row["more_than_random"] == 0.0) == (row["activated_by"] == "random") for row in rows)
    text = report.tables([{**row, "benchmark": "exact", "case": "a", "date": "d", "commit": "c"} for row in rows])
    assert text.count("standard error") == 6
