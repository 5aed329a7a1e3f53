"""Updates as integers with noise: what a private round adds up.

An update of norm C becomes integers of norm K = 2^k at the most, exactly, so that the sum moves by K if a participant's
part is taken out (zero-out adjacency), and by no rounding more. A share of the noise is discrete Gaussian of variance V
(Kairouz et al. 2021); h of them have (z·K)² together. Lanes are 32 bits wide and wrap; noise is never clamped.
"""

import decimal
import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from mpctf_secure.config.privacy import Adaptive
from mpctf_secure.errors import COORDINATOR, SecurityError, UsageError
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import hkdf, sha256
from mpctf_secure.hazmat.prg import Generator, Run
from mpctf_secure.privacy.noise import Integers, discrete_gaussian, gaussian_vector

Vector = npt.NDArray[np.float32]
Lanes = npt.NDArray[np.uint32]

BITS = 32
INDICATOR = 2**19
"""A participant whose update was not clipped counts +INDICATOR, one whose was −INDICATOR."""
_MOST_BITS = 20  # of K
_TAIL = 8  # standard deviations of the sum's noise that fit into a lane
_LEAST_VARIANCE = 16  # from σ = 4 on the sum of discrete Gaussians is one, but for 10⁻⁵⁹ (Kairouz et al. 2021, cor. 12)
_MOST_VARIANCE = 2**60
_SLACK = 10  # of ‖noise‖ over √d standard deviations: e^−50
_LEAST_CLIP_NORM = 1e-6
_PLAN = "mpctf-secure privacy plan shows how much noise a guarantee takes"
_SHRINK = 1 - 2.0**-20


@dataclass(frozen=True)
class Scheme:
    """Of one round: how many may be summed, h, z of the updates, σ_b of the indicators or nothing, and C.

    `shares` h: of so many participants the noise is enough: the fewest survivors less those who may collude, of whom a
    pair has one; 1 where the coordinator adds all of it.
    """

    summands: int
    shares: int
    noise_multiplier: float
    indicator_noise: float | None
    clip_norm: float

    @property
    def units(self) -> int:
        """K: the largest 2^k, k ≤ 20, with which updates and eight standard deviations of noise fit into a lane."""
        for bits in range(_MOST_BITS, 0, -1):
            room = (1 << (BITS - 1)) - (self.summands << bits)
            if room > 0 and room**2 > _TAIL**2 * self.summands * self._variance(1 << bits):
                return 1 << bits
        raise UsageError(
            f"privacy.noise_multiplier: {self.noise_multiplier:g} is too much for lanes of 32 bits", hint=_PLAN
        )

    @property
    def variance(self) -> int:
        """V of a share of the updates' noise."""
        return self._variance(self.units)

    @property
    def indicator_variance(self) -> int:
        """V of a share of the indicators' noise; 0 where there are none."""
        if self.indicator_noise is None:
            return 0
        return _rounded_up((Fraction(self.indicator_noise) * 2 * INDICATOR) ** 2 / self.shares)

    def _variance(self, units: int) -> int:
        return _rounded_up((Fraction(self.noise_multiplier) * units) ** 2 / self.shares)

    def check(self) -> None:
        """UsageError where the noise is too little or too much for what is proved of it."""
        shares = {"updates": self.variance}
        if self.indicator_noise is not None:
            shares["indicators"] = self.indicator_variance
        for what, variance in shares.items():
            if not _LEAST_VARIANCE <= variance <= _MOST_VARIANCE:
                raise UsageError(
                    f"privacy.noise_multiplier: a share of the {what}' noise has variance {variance}, which is outside "
                    "[16, 2^60]",
                    hint=_PLAN,
                )


def _rounded_up(value: Fraction) -> int:
    return -(-value.numerator // value.denominator)


def joint_noise(noise_multiplier: float, indicator_noise: float) -> float:
    """z_Δ of the updates, so that both releases together are as private as one with z (Andrew et al. 2021, theorem 1).

    The indicators' σ_b must be above z/2.
    """
    return float((noise_multiplier**-2 - (2 * indicator_noise) ** -2) ** -0.5)


def to_integers(update: Vector, scheme: Scheme) -> tuple[Integers, bool]:
    """Integers [d] of norm K at the most, and whether ‖update‖ ≤ C.

    What is no finite update counts as nothing, and as clipped: that it is none must not show.
    """
    norm = float(np.sqrt(np.square(update, dtype=np.float64).sum()))
    if not math.isfinite(norm):
        return np.zeros(update.size, np.int64), False
    factor = scheme.units / max(norm, scheme.clip_norm)
    while True:
        integers = np.rint(update * np.float64(factor)).astype(np.int64)
        square = int(np.square(integers).sum())  # exact: before rounding it was 2⁴⁰ at the most
        if square <= scheme.units**2:
            return integers, norm <= scheme.clip_norm
        factor *= min(_SHRINK, scheme.units / math.sqrt(square))


def indicate(fits: bool, scheme: Scheme) -> int:
    """The scalar of a participant: whether its update was not clipped, where that is asked."""
    return (INDICATOR if fits else -INDICATOR) if scheme.indicator_variance else 0


def noised(values: Integers, indicator: int, scheme: Scheme, secret: bytes, run: Run = map) -> tuple[Lanes, int]:
    """A share of noise on both: lanes [d], and the scalar.

    Its seeds come from a secret and from what they hide: the same values get the same noise, others never do, for the
    difference of two would be bare.
    """
    variance, of_indicator = scheme.variance, scheme.indicator_variance
    terms = enc(str(indicator), variance, of_indicator)
    seed = hkdf(secret, enc("mpctf-secure/noise/v1", sha256(values.tobytes()), terms))
    noise = gaussian_vector(hkdf(seed, enc("updates")), variance, values.size, run)
    noise += values
    lanes = noise.astype(np.uint32)
    if of_indicator:
        indicator += int(discrete_gaussian(Generator(hkdf(seed, enc("indicator"))), of_indicator, 1)[0])
    return lanes, indicator


def to_signed(lanes: Lanes) -> Integers:
    """A sum's lanes [d] as the integers that they are."""
    return lanes.view("<i4").astype(np.int64)


def check_sum(values: Integers, survivors: int, scheme: Scheme, *, central: bool) -> None:
    """SecurityError for a noised sum [d] that honest ones never give: it bounds what a lie can do."""
    sources = 1 if central else survivors
    noise = math.sqrt(sources * scheme.variance) * (math.sqrt(values.size) + _SLACK)
    norm = math.sqrt(float(np.square(values, dtype=np.float64).sum()))
    if norm > (survivors * scheme.units + noise) * (1 + 1e-6):
        raise SecurityError("published sum is above what clip norm and noise allow", culprits=[COORDINATOR])


def to_mean(values: Integers, survivors: int, scheme: Scheme) -> Vector:
    """The mean update [d] = Σq · C / (K·survivors): elementwise, so that it has the same bits everywhere."""
    return (values * (scheme.clip_norm / (scheme.units * survivors))).astype(np.float32)


def next_clip_norm(clip_norm: float, indicators: int, survivors: int, privacy: Adaptive) -> float:
    """C·exp(−η·(b̄ − γ)), between 10⁻⁶ and the largest; b̄ is the share of unclipped updates by the noised sum.

    In decimal arithmetic, which has the same digits everywhere.
    """
    share = min(max(Fraction(indicators, 2 * INDICATOR * survivors) + Fraction(1, 2), Fraction(0)), Fraction(1))
    with decimal.localcontext(prec=50):
        unclipped = Decimal(share.numerator) / share.denominator
        step = Decimal(privacy.clip_learning_rate) * (unclipped - Decimal(privacy.target_quantile))
        following = float(Decimal(clip_norm) * (-step).exp())
    return min(max(following, _LEAST_CLIP_NORM), privacy.largest_clip_norm)
