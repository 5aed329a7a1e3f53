"""What releases cost together, ε for a δ: of everything exactly, of samples by the tighter of two bounds."""

import collections
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mpctf_secure.errors import UsageError
from mpctf_secure.privacy import gaussian

_MEANINGLESS = 50.0
"""Above this ε no guarantee means anything: e^50 is 5·10²¹."""
NO_GUARANTEE = "NO MEANINGFUL GUARANTEE, only clipping and regularising noise"
_MOST_LOG_NOISE = math.log(1e6)
_LEAST_EPSILON = 1e-12
_ERROR = 0.01
_MOST_STEPS = 10**5  # PRV takes seconds for these, and gigabytes for a hundred times as many
_DIGITS = 1e-4  # relative, of a noise multiplier that is looked for


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Release:
    """`steps` times Gaussian noise of `noise_multiplier` sensitivities, on a Poisson sample of records at this rate."""

    noise_multiplier: Annotated[float, Field(gt=0)]
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    steps: Annotated[int, Field(ge=1)] = 1


class Cost(NamedTuple):
    """ε, and which accountant says so."""

    epsilon: float
    accountant: str

    @property
    def is_meaningless(self) -> bool:
        """Whether ε is too large to promise anything."""
        return self.epsilon > _MEANINGLESS

    def qualified(self, text: str) -> str:
        """The text about this guarantee, if it is one."""
        return f"{NO_GUARANTEE}: {text}" if self.is_meaningless else text


def cost(releases: Sequence[Release], delta: float) -> Cost:
    """ε of all these releases of one data set at δ; UsageError for a δ outside (0, 1)."""
    if not 0 < delta < 1:
        raise UsageError(f"delta: {delta} is outside (0, 1)", hint="below one over the number of records")
    if all(release.sampling_rate == 1 for release in releases):
        mu = gaussian.distance((release.noise_multiplier, release.steps) for release in releases)
        return Cost(gaussian.epsilon(mu, delta), "closed form")
    return _of_samples(releases, delta)


def check_delta(name: str, delta: float, records: int) -> None:
    """UsageError for a δ with which a mechanism may publish some record as it is."""
    if not 0 < delta < 1 / records:
        raise UsageError(
            f"{name}: {delta:g} is outside (0, 1/{records})",
            hint="below one over the number of rows: else to publish a whole row is allowed",
        )


def cost_of_integers(releases: Sequence[Release], delta: float) -> Cost:
    """The same of noise on integers, for which the closed form is that of continuous noise.

    With σ above 4096 δ is off by less than a thousandth, and with σ below that any ε is meaningless.
    """
    return cost(releases, delta * (1 - 1e-3))


def _of_samples(releases: Sequence[Release], delta: float) -> Cost:
    """Rényi DP holds for any noise; privacy loss distributions are tighter, and fail where ε is large."""
    from opacus.accountants import PRVAccountant, RDPAccountant  # noqa: PLC0415  # with torch: only where it is needed

    alike = collections.Counter[tuple[float, float]]()  # PRV takes its time for each entry
    for one in releases:
        alike[one.noise_multiplier, one.sampling_rate] += one.steps
    history = [(noise, rate, steps) for (noise, rate), steps in sorted(alike.items())]
    renyi, numerical = RDPAccountant(), PRVAccountant()
    renyi.history, numerical.history = list(history), list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another order would be tighter still
        bound = Cost(max(float(renyi.get_epsilon(delta=delta)), 0.0), "RDP")
        if bound.is_meaningless or bound.epsilon == 0 or sum(alike.values()) > _MOST_STEPS:
            return bound
        try:
            error = min(_ERROR, bound.epsilon / 10)  # it is added to ε
            return min(bound, Cost(max(float(numerical.get_epsilon(delta=delta, eps_error=error)), 0.0), "PRV"))
        except (ArithmeticError, MemoryError, RuntimeError, ValueError):
            return bound


def noise_for(name: str, target: float, price: Callable[[float], Cost]) -> float:
    """The smallest noise multiplier of four digits whose price is no more than ε `target`.

    UsageError about `name` where none from 10⁻⁶ to 10⁶ is.
    """
    from scipy.optimize import brentq  # noqa: PLC0415  # as above

    @functools.cache  # brentq begins with both ends again
    def excess(log_noise: float) -> float:
        """How far the price is above, in powers of e: nearly a straight line."""
        return math.log(max(price(math.exp(log_noise)).epsilon, _LEAST_EPSILON) / target)

    low = high = 0.0
    while excess(high) > 0:
        low, high = high, high + 1
        if high > _MOST_LOG_NOISE:
            raise UsageError(f"{name}: no noise reaches {target:g}", hint="a larger epsilon, or fewer rounds")
    while low == high or excess(low) <= 0:
        low, high = low - 1, low
        if low < -_MOST_LOG_NOISE:
            return math.exp(high)
    noise = math.exp(brentq(excess, low, high, xtol=_DIGITS))
    unit = 10.0 ** (math.floor(math.log10(noise)) - 3)
    noise = float(f"{noise:.4g}")
    while price(noise).epsilon > target:
        noise = float(f"{noise + unit:.4g}")
    return noise
