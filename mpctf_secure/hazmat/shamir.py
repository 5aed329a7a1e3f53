"""Shamir secret sharing (1979) of 32-byte secrets over GF(p), p = 2²⁵⁶ + 297.

The prime is the smallest above 2²⁵⁶, so every 32-byte string is a field element as it stands and no secret is
clamped or reduced. A share is the polynomial's value at x ≥ 1 as 33 big-endian bytes.
"""

import functools
from collections.abc import Mapping

from mpctf_secure.errors import SecurityError

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
COEFFICIENT_BYTES = 64


def split(secret: bytes, entropy: bytes, count: int) -> list[bytes]:
    """Shares for x = 1 … `count`; any t of them give the secret, fewer nothing at all.

    `entropy` holds t − 1 coefficients of 64 uniform bytes each. Reduced mod p they are within 2⁻²⁵⁴ of uniform
    (the way of RFC 9380, section 5), and one length of entropy always suffices.
    """
    degree, rest = divmod(len(entropy), COEFFICIENT_BYTES)
    if len(secret) != SECRET_BYTES or rest or not degree < count:
        raise ValueError("a secret has 32 bytes, a coefficient 64, and the threshold is at most the number of shares")
    coefficients = [int.from_bytes(secret, "big")]
    for start in range(0, len(entropy), COEFFICIENT_BYTES):
        coefficients.append(int.from_bytes(entropy[start : start + COEFFICIENT_BYTES], "big") % PRIME)
    return [_evaluate(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in range(1, count + 1)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret from shares by x; the caller brings exactly as many as the threshold.

    SecurityError if a share is no field element or the result has more than 32 bytes, which honest shares never give.
    """
    values = [check_share(share) for share in shares.values()]
    weights = _weights_at_zero(tuple(shares))
    secret = sum(value * weight for value, weight in zip(values, weights, strict=True)) % PRIME
    if secret >= 2**256:
        raise SecurityError("shares do not combine to a 32-byte secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def check_share(share: bytes) -> int:
    """The field element of one share; SecurityError for another length or a value ≥ p."""
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise SecurityError("share is not a field element of 33 bytes")
    return value


def _evaluate(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


@functools.lru_cache(maxsize=4)
def _weights_at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights; the points are public and the same for every secret of an attempt."""
    weights = []
    for x in points:
        numerator = denominator = 1
        for other in points:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        weights.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return tuple(weights)
