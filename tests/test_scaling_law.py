"""The scaling law: constants that are known come back from points with noise; points from which no law follows are refused."""

import itertools
import math

import pytest
import torch

from llmforge.errors import DataError
from llmforge.training import ScalingLaw, fit_scaling_law

# Hoffmann et al. 2022, arXiv:2203.15556, eq. 10.
CHINCHILLA = dict(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
SIZES, TOKENS = (1e7, 1e8, 1e9, 1e10), (1e8, 1e9, 1e10, 1e11)


def points(*, noise=0.0, sizes=SIZES, tokens=TOKENS, seed=0):
    """Runs that follow the published law, with log-normal noise."""
    pairs = list(itertools.product(sizes, tokens))
    c = CHINCHILLA
    clean = [c["E"] + c["A"] / n ** c["alpha"] + c["B"] / d ** c["beta"] for n, d in pairs]
    factors = (noise * torch.randn(len(pairs), generator=torch.Generator().manual_seed(seed))).exp().tolist()
    return [n for n, _ in pairs], [d for _, d in pairs], [a * b for a, b in zip(clean, factors, strict=True)]


def test_published_constants_come_back_from_points_without_noise():
    law = fit_scaling_law(*points())
    for name, value in CHINCHILLA.items():
        assert getattr(law, name) == pytest.approx(value, rel=1e-6), name
    assert law.residual < 1e-9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_published_constants_come_back_from_noisy_points_within_their_errors(seed):
    law = fit_scaling_law(*points(noise=2e-3, seed=seed))
    for name in ("E", "alpha", "beta"):  # 4 standard errors: once in 16,000 by chance
        assert abs(getattr(law, name) - CHINCHILLA[name]) < 4 * law.errors[name], name
        assert law.errors[name] < 0.1 * CHINCHILLA[name], name
    assert 5e-4 < law.residual < 3e-3
    # Chinchilla itself, 7 times the size and 14 times the tokens of the largest run, by the published formula: 1.937.
    assert law.loss(70e9, 1.4e12) == pytest.approx(1.937, rel=0.01)


def test_an_outlier_does_not_move_the_law():
    sizes, tokens, losses = points(noise=1e-3)
    losses[5] *= 1.2  # a run with a bad learning rate
    law = fit_scaling_law(sizes, tokens, losses)
    assert (law.alpha, law.beta) == (pytest.approx(0.34, rel=0.05), pytest.approx(0.28, rel=0.05))


def test_optimal_is_the_lowest_loss_of_its_budget():
    law = ScalingLaw(**CHINCHILLA, errors={}, residual=0.0)
    n, d = law.optimal(1e21)
    assert 6 * n * d == pytest.approx(1e21)
    # Every other split of the same budget is worse.
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert law.loss(n * factor, d / factor) > law.loss(n, d)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (points(sizes=SIZES[:1], tokens=TOKENS), "4 runs cannot determine the law's 5 constants; at least 6"),
        (points(sizes=SIZES[:2], tokens=TOKENS), "2 different sizes; a curve needs at least 3"),
        (points(sizes=SIZES, tokens=TOKENS[:2]), "2 different numbers of tokens"),
        (([1e6, 1e7, 1e8] * 2, [2e7, 2e8, 2e9] * 2, [4.0, 3.5, 3.2] * 2), "weights and tokens grow together"),
        (([1e6] * 6, [1e7] * 5, [3.0] * 6), "6 sizes, 5 numbers of tokens and 6 losses"),
        (([1e6] * 6, [1e7] * 6, [3.0] * 5 + [math.nan]), "losses must all be above 0 and finite; leave out runs that diverged"),
        (([1e6] * 5 + [0], [1e7] * 6, [3.0] * 6), "num_params must all be above 0"),
    ],
)  # fmt: skip
def test_runs_from_which_no_law_follows_are_refused(runs, message):
    with pytest.raises(DataError, match=message):
        fit_scaling_law(*runs)


def test_losses_that_rise_with_the_size_are_no_law():
    sizes, tokens, _ = points(sizes=(1e6, 1e7, 1e8), tokens=(1e8, 1e9, 1e10))
    rising = [3.0 + 0.1 * math.log10(n) - 0.1 * math.log10(d) for n, d in zip(sizes, tokens, strict=True)]
    with pytest.raises(DataError, match="do not fall with the number of weights"):
        fit_scaling_law(sizes, tokens, rising)


def test_constants_that_the_runs_leave_open_are_named():
    # Small models on little text are far from E: noise of a percent hides it.
    with pytest.warns(
        UserWarning, match=r"the 9 runs do not determine E = .* \+- .*: trust no prediction far from them"
    ):
        fit_scaling_law(*points(sizes=(1e5, 2e5, 4e5), tokens=(1e6, 2e6, 4e6), noise=1e-2))
