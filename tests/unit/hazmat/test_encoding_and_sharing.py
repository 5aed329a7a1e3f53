import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.errors import DecodeError, SecurityError
from mpctf_secure.hazmat import shamir
from mpctf_secure.hazmat.encoding import Reader, decode_sequence, enc, enc_sequence


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_sequence_survives_the_round_trip(items: list[bytes]) -> None:
    assert decode_sequence(enc_sequence(items), 8) == items


@given(st.binary(max_size=60), st.text(max_size=10), st.integers(0, 2**64 - 1))
def test_fields_survive_the_round_trip(raw: bytes, text: str, number: int) -> None:
    with Reader(enc(raw, text, number)) as reader:
        assert (reader.bytes(), reader.text(), reader.integer()) == (raw, text, number)


@given(st.binary(max_size=64))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    try:
        items = decode_sequence(data, 100)
    except DecodeError:
        return
    assert enc_sequence(items) == data


@pytest.mark.parametrize("data", [enc_sequence([b"a"]) + b"x", enc_sequence([b"a"])[:-1], b"\xff\xff\xff\xff"])
def test_trailing_missing_and_absurd_lengths_are_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_sequence(data, 100)


@given(st.binary(min_size=32, max_size=32), st.integers(1, 8), st.data())
def test_any_t_shares_give_the_secret(secret: bytes, threshold: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(threshold, 12))
    shares = shamir.split(secret, os.urandom(64 * (threshold - 1)), count)
    chosen = data.draw(st.permutations(range(1, count + 1)))[:threshold]
    assert shamir.combine({x: shares[x - 1] for x in chosen}) == secret


def test_fewer_than_t_shares_do_not() -> None:
    shares = shamir.split(b"\7" * 32, b"\2" * 64 + b"\3" * 64, 5)
    assert shamir.combine(dict(enumerate(shares[:3], 1))) == b"\7" * 32
    with contextlib.suppress(SecurityError):
        assert shamir.combine({1: shares[0], 2: shares[1]}) != b"\7" * 32


@pytest.mark.parametrize("share", [b"", bytes(32), shamir.PRIME.to_bytes(33, "big"), b"\xff" * 33])
def test_share_that_is_no_field_element_is_refused(share: bytes) -> None:
    with pytest.raises(SecurityError):
        shamir.check_share(share)


def test_largest_secret_needs_no_reduction() -> None:
    secret = b"\xff" * 32
    shares = shamir.split(secret, os.urandom(64), 3)
    assert shamir.combine({1: shares[0], 3: shares[2]}) == secret


@pytest.mark.parametrize(("secret", "entropy", "count"), [(31, 64, 3), (32, 63, 3), (32, 192, 3)])
def test_sharing_takes_whole_secrets_and_coefficients_only(secret: int, entropy: int, count: int) -> None:
    with pytest.raises(ValueError, match="threshold"):
        shamir.split(bytes(secret), bytes(entropy), count)


def test_shares_beyond_32_bytes_are_refused() -> None:
    """x = 1, 2 of a line through 2²⁵⁶ at 0: honest shares never give it."""
    shares = {x: ((2**256 + x) % shamir.PRIME).to_bytes(33, "big") for x in (1, 2)}
    with pytest.raises(SecurityError, match="32-byte"):
        shamir.combine(shares)
