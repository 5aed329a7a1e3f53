"""White-box audits: what a mechanism promises at the most, from what it let slip.

Of many runs in two worlds that differ in one contribution: whoever knows its direction can tell them apart by one
number, which is normal in both, `mu` standard deviations apart (Nasr et al. 2023 call it the strongest adversary). From
so many runs follows a mu that it surely has, and so an ε that it surely does not keep below.

Of one run with many canaries, each there or not by the toss of a coin (Steinke et al. 2023): the more of them are
guessed, the larger ε must be. It shows less, but needs no second run.
"""

import math

import numpy as np
import numpy.typing as npt

from mpctf_secure.privacy.gaussian import epsilon

Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]
_SURELY = 0.05  # a right mechanism is suspected so often
_MOST_EPSILON, _STEPS = 50.0, 60  # of bisection
_SIGMAS = 3.0  # 1 in 700 right mechanisms is suspected


def lower_bound(with_contribution: Floats, without: Floats, delta: float) -> float:
    """ε that the mechanism exceeds, from the adversary's number in runs of either world [n], [m]; 0 if it may hide all.

    ValueError for fewer than a hundred runs of a world.
    """
    runs = min(with_contribution.size, without.size)
    if runs < 100:
        raise ValueError(f"{runs} runs of a world show nothing")
    spread = math.sqrt((with_contribution.var(ddof=1) + without.var(ddof=1)) / 2)
    apart = abs(float(with_contribution.mean() - without.mean())) / spread
    # Of the difference of means, and of the spread, which has a relative error of 1/√(2·2n).
    error = math.sqrt(1 / with_contribution.size + 1 / without.size + apart**2 / (4 * runs))
    return epsilon(max(apart - _SIGMAS * error, 0.0), delta)


def lower_bound_of_one_run(scores: Floats, included: Booleans, guesses: int, delta: float) -> float:
    """ε that the mechanism exceeds, from the score that it gave each canary [m] and whether that was there [m].

    So many guesses are made: those of the highest scores are taken to be in, and as many of the lowest to be out.
    """
    order = np.argsort(scores)
    half = guesses // 2
    right = int((~included[order[:half]]).sum() + included[order[-half:]].sum())
    low, high = 0.0, _MOST_EPSILON
    for _ in range(_STEPS):
        middle = (low + high) / 2
        surprising = _chance(middle, delta, scores.size, 2 * half, right) < _SURELY
        low, high = (middle, high) if surprising else (low, middle)
    return low


def _chance(epsilon: float, delta: float, canaries: int, guesses: int, right: int) -> float:
    """The most likely that an (ε, δ) mechanism lets so many guesses be right (Steinke et al. 2023, theorem 5.2).

    With δ = 0 their number is a binomial's at the most, each being right with probability e^ε / (1 + e^ε).
    """
    from scipy.stats import binom  # noqa: PLC0415  # a second, and nothing but an audit needs it

    rate = 1 / (1 + math.exp(-epsilon))
    fewer = binom.pmf(np.arange(right - 1, -1, -1), guesses, rate).cumsum()  # right − i … right − 1, for i = 1 …
    worst = float((fewer / np.arange(1, right + 1)).max(initial=0.0))
    return float(binom.sf(right - 1, guesses, rate)) + 2 * canaries * delta * worst
