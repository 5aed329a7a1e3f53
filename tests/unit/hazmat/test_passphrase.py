import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.errors import DecodeError, SecurityError
from mpctf_secure.hazmat import passphrase
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.passphrase import LIGHT, Cost, WrongPassphraseError

ENTROPY = bytes(range(passphrase.SALT_BYTES + passphrase.NONCE_BYTES))
SEALED = passphrase.seal(b"correct horse", b"the secret", LIGHT, ENTROPY)


def with_checksum(body: bytes) -> bytes:
    return body + sha256(body)


def test_what_was_sealed_comes_back_and_is_not_in_the_file() -> None:
    assert passphrase.unseal(b"correct horse", SEALED) == b"the secret"
    assert b"secret" not in SEALED
    assert passphrase.seal(b"correct horse", b"the secret", LIGHT, ENTROPY[::-1]) != SEALED


def test_wrong_passphrase_and_damage_are_told_apart() -> None:
    with pytest.raises(WrongPassphraseError, match="wrong passphrase"):
        passphrase.unseal(b"correct house", SEALED)
    for at in range(len(SEALED)):
        flipped = SEALED[:at] + bytes([SEALED[at] ^ 1]) + SEALED[at + 1 :]
        with pytest.raises(DecodeError, match="damaged"):
            passphrase.unseal(b"correct horse", flipped)


@pytest.mark.parametrize("cost", [Cost(1, 1 << 31), Cost(1 << 20, LIGHT.memory), Cost(0, LIGHT.memory), Cost(1, 1)])
def test_absurd_cost_is_refused_before_it_is_paid(cost: Cost) -> None:
    """Whoever can write the file could otherwise make the machine run out of memory, or of patience."""
    box = bytes(40)
    body = enc("mpctf-secure/sealed/v1", cost.passes, cost.memory, ENTROPY[:16], ENTROPY[16:], box)
    with pytest.raises(DecodeError, match="out of bounds"):
        passphrase.unseal(b"", with_checksum(body))


def test_other_format_is_named() -> None:
    with pytest.raises(DecodeError, match="another format"):
        passphrase.unseal(b"", with_checksum(enc("mpctf-secure/sealed/v2")))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    for candidate in (data, with_checksum(data), with_checksum(enc("mpctf-secure/sealed/v1") + data)):
        with pytest.raises(SecurityError):
            passphrase.unseal(b"x", candidate)
