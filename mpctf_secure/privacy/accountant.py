"""What releases cost together, ε for a δ: of everything exactly, of samples by the tighter of two bounds."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mpctf_secure.errors import UsageError
from mpctf_secure.privacy import gaussian

MEANINGLESS = 50.0
"""Above this ε no guarantee means anything: e^50 is 5·10²¹."""
_MOST_NOISE = 1e6
_DIGITS = 1e-4  # relative, of a noise multiplier that is looked for


class Release(NamedTuple):
    """`steps` times Gaussian noise of `noise_multiplier` sensitivities, on a Poisson sample of records at this rate."""

    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1


class Cost(NamedTuple):
    """ε, and which accountant says so."""

    epsilon: float
    accountant: str

    @property
    def is_meaningless(self) -> bool:
        """Whether ε is too large to promise anything."""
        return self.epsilon > MEANINGLESS


def cost(releases: Sequence[Release], delta: float) -> Cost:
    """ε of all these releases of one data set at δ; UsageError for a δ outside (0, 1)."""
    if not 0 < delta < 1:
        raise UsageError(f"delta: {delta} is outside (0, 1)", hint="below one over the number of records")
    if all(release.sampling_rate == 1 for release in releases):
        mu = gaussian.distance((release.noise_multiplier, release.steps) for release in releases)
        return Cost(gaussian.epsilon(mu, delta), "closed form")
    return _of_samples(releases, delta)


def cost_of_integers(releases: Sequence[Release], delta: float) -> Cost:
    """The same of noise on integers, for which the closed form is that of continuous noise.

    With σ above 4096 δ is off by less than a thousandth, and with σ below that any ε is meaningless.
    """
    return cost(releases, delta * (1 - 1e-3))


def _of_samples(releases: Sequence[Release], delta: float) -> Cost:
    """Rényi DP holds for any noise; privacy loss distributions are tighter, and fail where ε is large."""
    from opacus.accountants import PRVAccountant, RDPAccountant  # noqa: PLC0415  # with torch: only where it is needed

    history = [(one.noise_multiplier, one.sampling_rate, one.steps) for one in releases]
    bounds = []
    for accountant, name in ((RDPAccountant(), "RDP"), (PRVAccountant(), "PRV")):
        accountant.history = list(history)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another order would be tighter still
            bounds.append(Cost(float(accountant.get_epsilon(delta=delta)), name))
        if bounds[0].is_meaningless:
            break
    return min(bounds)


def noise_for(target: float, price: Callable[[float], Cost]) -> float:
    """The smallest noise multiplier, rounded up to four digits, whose price is no more than ε `target`.

    UsageError where none below 10⁶ is.
    """
    low, high = 0.0, 1.0
    while price(high).epsilon > target:
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise UsageError(f"no noise reaches epsilon {target:g}", hint="a larger epsilon")
    while high - low > _DIGITS * high:
        middle = (low + high) / 2
        low, high = (middle, high) if price(middle).epsilon > target else (low, middle)
    unit: float = 10.0 ** (math.floor(math.log10(high)) - 3)
    return math.ceil(high / unit) * unit
