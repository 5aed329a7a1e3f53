"""Secrets under a passphrase: Argon2id (RFC 9106) and XSalsa20-Poly1305, both libsodium's.

A sealed secret says its own cost, which is bounded before any of it is paid, and carries a checksum, so that a damaged
file and a wrong passphrase are told apart. The checksum covers public bytes only and helps nobody to guess.
"""

from dataclasses import dataclass

from nacl.exceptions import CryptoError
from nacl.pwhash import argon2id
from nacl.secret import SecretBox

from mpctf_secure.errors import DecodeError, SecurityError
from mpctf_secure.hazmat.encoding import Reader, enc
from mpctf_secure.hazmat.kdf import HASH_BYTES, sha256

SALT_BYTES, NONCE_BYTES = argon2id.SALTBYTES, SecretBox.NONCE_SIZE
_FORMAT = "mpctf-secure/sealed/v1"
_MOST_BYTES = 1 << 20


class WrongPassphraseError(SecurityError):
    """The file is whole and the passphrase is not its."""


@dataclass(frozen=True)
class Cost:
    """Argon2id's passes and bytes of memory."""

    passes: int
    memory: int


STRONG = Cost(argon2id.OPSLIMIT_MODERATE, argon2id.MEMLIMIT_MODERATE)  # 256 MiB: for what a person can remember
LIGHT = Cost(argon2id.OPSLIMIT_MIN, argon2id.MEMLIMIT_MIN)  # for 32 random bytes, which no guessing finds
_MOST = Cost(16, 1 << 30)


def seal(passphrase: bytes, secret: bytes, cost: Cost, entropy: bytes) -> bytes:
    """Seal `secret`; `entropy` is SALT_BYTES + NONCE_BYTES from the operating system, fresh each time."""
    salt, nonce = entropy[:SALT_BYTES], entropy[SALT_BYTES:]
    box = SecretBox(_stretch(passphrase, salt, cost)).encrypt(secret, nonce).ciphertext
    body = enc(_FORMAT, cost.passes, cost.memory, salt, nonce, box)
    return body + sha256(body)


def unseal(passphrase: bytes, sealed: bytes) -> bytes:
    """What was sealed; DecodeError for damaged bytes or an absurd cost, WrongPassphraseError for a wrong passphrase."""
    cost, salt, nonce, box = check(sealed)
    try:
        return SecretBox(_stretch(passphrase, salt, cost)).decrypt(box, nonce)
    except CryptoError as error:
        raise WrongPassphraseError("wrong passphrase", hint="try again; nobody can restore it") from error


def check(sealed: bytes) -> tuple[Cost, bytes, bytes, bytes]:
    """Cost, salt, nonce and box of a file that is whole; DecodeError otherwise. Needs no passphrase."""
    body, checksum = sealed[:-HASH_BYTES], sealed[-HASH_BYTES:]
    if sha256(body) != checksum:
        raise DecodeError("the sealed file is damaged")
    with Reader(body) as reader:
        if reader.text() != _FORMAT:
            raise DecodeError("the sealed file has another format than this version's")
        cost = Cost(reader.integer(), reader.integer())
        salt, nonce, box = reader.bytes(SALT_BYTES), reader.bytes(NONCE_BYTES), reader.bytes(limit=_MOST_BYTES)
    # Whoever can write the file could otherwise make its owner's machine run out of memory.
    if not (LIGHT.passes <= cost.passes <= _MOST.passes and LIGHT.memory <= cost.memory <= _MOST.memory):
        raise DecodeError(f"the sealed file asks for {cost.passes} passes over {cost.memory} bytes: out of bounds")
    return cost, salt, nonce, box


def _stretch(passphrase: bytes, salt: bytes, cost: Cost) -> bytes:
    return argon2id.kdf(SecretBox.KEY_SIZE, passphrase, salt, cost.passes, cost.memory)
