"""Differential privacy of Gaussian noise without sampling: a closed form, exact at any noise.

T releases with noise multipliers z_i are as private as one with μ = √Σ 1/z_i² standard deviations between the two
worlds; δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) (Balle and Wang 2018, theorem 8), in log space.
"""

import math
from collections.abc import Iterable

_STEPS = 200  # of bisection: more than a float64 has bits


def distance(releases: Iterable[tuple[float, int]]) -> float:
    """μ of releases one after another: (noise multiplier, how many of them)."""
    return math.sqrt(math.fsum(count / z**2 for z, count in releases))


def log_delta(mu: float, epsilon: float) -> float:
    """ln δ(ε); −inf where it is 0 in float64."""
    from scipy.special import log_ndtr  # noqa: PLC0415  # a third of a second, which every process would pay

    if not mu:
        return -math.inf
    inside = float(log_ndtr(mu / 2 - epsilon / mu))
    outside = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return inside + math.log(-math.expm1(outside - inside)) if outside < inside else -math.inf


def epsilon(mu: float, delta: float) -> float:
    """The smallest ε ≥ 0 with δ(ε) ≤ δ, rounded up in its last bits; ValueError unless 0 < δ < 1."""
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} is outside (0, 1)")
    target = math.log(delta)
    if log_delta(mu, 0.0) <= target:
        return 0.0
    low, high = 0.0, 1.0
    while log_delta(mu, high) > target:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if log_delta(mu, middle) > target else (low, middle)
    return high
