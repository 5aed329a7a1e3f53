"""Shamir secret sharing (1979) of 32-byte secrets over GF(p), p = 2²⁵⁶ + 297.

The prime is the smallest above 2²⁵⁶, so every 32-byte string is a field element as it stands and no secret is
clamped or reduced. A share is the polynomial's value at x ≥ 1 as 33 big-endian bytes.
"""

from collections.abc import Callable, Mapping

from mpctf_secure.errors import SecurityError

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33

Randomness = Callable[[int], bytes]


def split(secret: bytes, threshold: int, count: int, rand: Randomness) -> list[bytes]:
    """Shares for x = 1 … `count`; any `threshold` of them give the secret, fewer nothing at all."""
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError("a secret has 32 bytes and 1 ≤ threshold ≤ count")
    coefficients = [int.from_bytes(secret, "big"), *(_uniform(rand) for _ in range(threshold - 1))]
    return [_evaluate(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in range(1, count + 1)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret from shares by x; the caller brings exactly as many as the threshold.

    SecurityError if a share is no field element or the result has more than 32 bytes, which honest shares never give.
    """
    values = {x: check_share(share) for x, share in shares.items()}
    secret = sum(value * _weight_at_zero(x, values) for x, value in values.items()) % PRIME
    if secret >= 2**256:
        raise SecurityError("shares do not combine to a 32-byte secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def check_share(share: bytes) -> int:
    """The field element of one share; SecurityError for another length or a value ≥ p."""
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise SecurityError("share is not a field element of 33 bytes")
    return value


def _uniform(rand: Randomness) -> int:
    # Rejection: reducing 257 bits mod p would make small values twice as likely.
    while (value := int.from_bytes(rand(SHARE_BYTES), "big") & ((1 << 257) - 1)) >= PRIME:
        pass
    return value


def _evaluate(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def _weight_at_zero(x: int, points: Mapping[int, int]) -> int:
    numerator = denominator = 1
    for other in points:
        if other != x:
            numerator = numerator * other % PRIME
            denominator = denominator * (other - x) % PRIME
    return numerator * pow(denominator, -1, PRIME) % PRIME
