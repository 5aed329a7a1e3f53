import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mpctf_secure.hazmat.prg import Generator
from mpctf_secure.privacy import noise

DRAWS = 1 << 17


def source(number: int = 0) -> Generator:
    return Generator(number.to_bytes(32, "big"))


def expected(variance: int, edge: int) -> np.ndarray:
    """Probabilities of −edge … edge and of everything beyond."""
    x = np.arange(-edge, edge + 1)
    weights = np.exp(-(x**2) / (2 * variance))
    whole = np.exp(-(np.arange(-40 * math.isqrt(variance) - 40, 40 * math.isqrt(variance) + 41) ** 2) / (2 * variance))
    inside = weights / whole.sum()
    return np.append(inside, 1 - inside.sum())


def fit(draws: np.ndarray, variance: int) -> float:
    """The p-value of draws under the discrete Gaussian."""
    edge = 3 * math.isqrt(variance)
    inside = np.bincount(draws[np.abs(draws) <= edge] + edge, minlength=2 * edge + 1)
    counts = np.append(inside, draws.size - inside.sum())
    return float(stats.chisquare(counts, draws.size * expected(variance, edge)).pvalue)


@pytest.mark.parametrize("variance", [1, 2, 16, 100, 2500])
def test_draws_fit_the_discrete_gaussian_and_no_other(variance: int) -> None:
    draws = noise.discrete_gaussian(source(variance), variance, DRAWS)
    assert fit(draws, variance) > 1e-3
    other = noise.discrete_gaussian(source(variance), math.ceil(variance * 1.05), DRAWS)
    assert fit(other, variance) < 1e-3


@pytest.mark.parametrize("variance", [10**6, 10**12, 2**60])
def test_wide_draws_have_the_moments_of_a_gaussian(variance: int) -> None:
    scaled = noise.discrete_gaussian(source(), variance, DRAWS) / math.sqrt(variance)
    sigma = DRAWS**-0.5
    assert abs(scaled.mean()) < 4 * sigma
    assert abs((scaled**2).mean() - 1) < 4 * math.sqrt(2) * sigma
    assert stats.kstest(scaled, "norm").pvalue > 1e-3


def test_same_seed_gives_the_same_draws_and_another_one_others() -> None:
    first, again, other = (noise.discrete_gaussian(source(n), 10**12, 1000) for n in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.any(first == other)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_there_are_as_many_as_are_asked_for(count: int) -> None:
    assert noise.discrete_gaussian(source(), 5, count).shape == (count,)


@pytest.mark.parametrize("variance", [0, -1, 2**88 + 1])
def test_variance_that_the_proof_does_not_cover_is_refused(variance: int) -> None:
    with pytest.raises(ValueError, match="is outside"):
        noise.discrete_gaussian(source(), variance, 1)


@pytest.mark.parametrize("variance", [1, 30, 10**12])
def test_floats_decide_as_exact_arithmetic_would(variance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = noise.discrete_gaussian(source(), variance, 300)
    monkeypatch.setattr(noise, "_MARGIN", 2.0)  # floats are trusted nowhere
    assert np.array_equal(noise.discrete_gaussian(source(), variance, 300), fast)


@given(st.fractions(0, 60, max_denominator=10**9), st.integers(0, 2**64 - 1))
def test_a_uniform_number_is_compared_with_a_power_of_e_digit_by_digit(gamma: Fraction, word: int) -> None:
    below = noise._is_below(source(), word, gamma)
    u = (word + 0.5) / 2**64
    if abs(u - math.exp(-gamma)) > 2.0**-50:
        assert below == (u < math.exp(-gamma))


def test_first_64_bits_that_do_not_decide_are_followed_by_others() -> None:
    """The first bits are those of 1/e; the next word of the source settles it."""
    tie = int(noise._POWERS[-1])
    wanted = noise._enclosed(Fraction(1), 128)[0] & (2**64 - 1)
    for number in range(4):
        drawn = int(source(number).bytes(8).view("<u8")[0])
        assert noise._is_below(source(number), tie, Fraction(1)) == (drawn < wanted)


def test_a_draw_beyond_one_word_goes_on_with_the_next() -> None:
    class Zeros:
        left = 2

        def bytes(self, length: int) -> np.ndarray:
            self.left -= 1
            return np.full(length, 0 if self.left > 0 else 255, np.uint8)

    assert list(noise._whole(Zeros(), 1)) == [noise._MOST_WHOLE]
