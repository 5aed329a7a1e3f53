"""Exact integer noise from the AES-CTR generator: no float decides a draw.

A decision "with probability p" compares p with a uniform real number of which 64 bits are drawn. In float64 that is
settled but once in 2⁴⁵ times; then p is computed to as many digits, and as many more bits are drawn, as it takes. Noise
from floating-point arithmetic shows in its last bits what it hides (Mironov 2012).
"""

import decimal
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import hkdf
from mpctf_secure.hazmat.prg import CHUNK_BYTES, Generator, Run

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

_WORD = 2.0**-64
_MARGIN = 2.0**-46  # above all that rounding adds up to: of γ, exp and the word, 2⁻⁵⁰ at the most each
MOST_VARIANCE = 1 << 88
_SLAB = CHUNK_BYTES // 8
_MOST_WHOLE = 40  # of one word
_SPARE = 1.02


def discrete_gaussian(source: Generator, variance: int, count: int) -> Integers:
    """`count` draws of P(x) ∝ exp(−x²/2σ²) over the integers [count] (Canonne, Kamath and Steinke 2020, algorithm 3).

    ValueError for a variance outside [1, 2⁸⁸].
    """
    if not 1 <= variance <= MOST_VARIANCE:
        raise ValueError(f"variance {variance} is outside [1, 2^88]")
    scale = math.isqrt(variance) + 1
    offset = variance / scale

    def gamma(x: int) -> Fraction:
        return Fraction((abs(x) * scale - variance) ** 2, 2 * variance * scale**2)

    def accepted(values: Integers) -> Integers:
        distance = np.abs(values) - offset
        return values[_decide(source, distance * distance / (2.0 * variance), lambda i: gamma(int(values[i])))]

    return _gather(lambda wanted: accepted(_laplace(source, scale, round(wanted * 1.32))), count)


def gaussian_vector(seed: bytes, variance: int, count: int, run: Run = map) -> Integers:
    """The same in slabs, each from a generator of its own, so that all cores can draw."""
    noise: Integers = np.empty(count, np.int64)

    def fill(slab: int) -> None:
        """One of them."""
        part = noise[slab * _SLAB : (slab + 1) * _SLAB]
        part[:] = discrete_gaussian(Generator(hkdf(seed, enc(slab))), variance, part.size)

    for _ in run(fill, range(-(-count // _SLAB))):
        pass
    return noise


def _laplace(source: Generator, scale: int, count: int) -> Integers:
    """`count` draws of P(x) ∝ exp(−|x|/scale) (algorithm 2)."""

    def some(wanted: int) -> Integers:
        """About so many."""
        size = round(wanted * 1.6)
        low = _below(source, scale, size)
        low = low[_decide(source, low / scale, lambda i: Fraction(int(low[i]), scale))]
        values = low + scale * _whole(source, low.size)
        negative = source.bytes(values.size) & 1 == 1
        values[negative] *= -1
        kept: Integers = values[~(negative & (values == 0))]  # zero has one sign
        return kept

    return _gather(some, count)


def _gather(some: Callable[[int], Integers], count: int) -> Integers:
    """So many of the values that `some` gives; it gives about as many as it is asked for."""
    parts, missing = [], count
    while missing > 0:
        parts.append(some(math.ceil(missing * _SPARE) + 8)[:missing])
        missing -= parts[-1].size
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _words(source: Generator, count: int) -> Words:
    return source.bytes(8 * count).view("<u8")


def _below(source: Generator, bound: int, count: int) -> Integers:
    """Uniform integers in [0, bound), by rejection."""
    limit = (1 << 64) - (1 << 64) % bound

    def some(wanted: int) -> Integers:
        """As many, or one or two fewer."""
        words = _words(source, wanted)
        return (words[words <= limit - 1] % np.uint64(bound)).astype(np.int64)

    return _gather(some, count)


def _whole(source: Generator, count: int) -> Integers:
    """How often in a row something of probability 1/e happens: k or more times with probability e^−k."""
    words = _words(source, count)
    surely, maybe = (_MOST_WHOLE - np.searchsorted(_POWERS, words, side=side) for side in ("right", "left"))
    for i in np.flatnonzero(surely != maybe):
        surely[i] += _is_below(source, int(words[i]), Fraction(int(maybe[i])))
    more = np.flatnonzero(surely == _MOST_WHOLE)
    if more.size:
        surely[more] += _whole(source, more.size)
    whole: Integers = surely.astype(np.int64)
    return whole


def _decide(source: Generator, gammas: Floats, exact: Callable[[int], Fraction]) -> npt.NDArray[np.bool_]:
    """For each γ ≥ 0 yes with probability e^−γ; `exact` gives the one with an index as it really is."""
    words = _words(source, gammas.size)
    ahead = np.exp(-gammas) - words * _WORD
    yes: npt.NDArray[np.bool_] = ahead > 0
    for i in np.flatnonzero(np.abs(ahead) < _MARGIN):
        yes[i] = _is_below(source, int(words[i]), exact(int(i)))
    return yes


def _is_below(source: Generator, word: int, gamma: Fraction) -> bool:
    """Whether the uniform number whose first 64 bits are `word` is below e^−γ."""
    bits, drawn = 64, word
    while True:
        least, most = _enclosed(gamma, bits)
        if drawn not in {least, most}:
            return drawn < least
        bits, drawn = bits + 64, (drawn << 64) | int(_words(source, 1)[0])


def _enclosed(gamma: Fraction, bits: int) -> tuple[int, int]:
    """⌊e^−γ·2^bits⌋ and maybe the same once more, or its neighbour: one of the two is right."""
    with decimal.localcontext(prec=bits // 3 + 40) as context:
        context.Emin = decimal.MIN_EMIN
        scaled = (-decimal.Decimal(gamma.numerator) / gamma.denominator).exp() * (1 << bits)
        error = decimal.Decimal(10) ** -15
        return int(scaled - error), int(scaled + error)


_POWERS: Words = np.array([_enclosed(Fraction(k), 64)[0] for k in range(_MOST_WHOLE, 0, -1)], np.uint64)
"""e^−k, ascending."""
