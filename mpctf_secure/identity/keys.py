"""An organisation's private keys in memory."""

from dataclasses import dataclass
from typing import Self

from mpctf_secure.errors import DecodeError
from mpctf_secure.hazmat.signature import KEY_BYTES, SigningKey

SECRET_BYTES = 3 * KEY_BYTES


@dataclass(frozen=True)
class Keys:
    """Three Ed25519 keys; no repr shows them.

    `box` signs the request, which proves its possession, and becomes X25519 for encryption by libsodium's conversion
    (joint use of one key pair: Thormarker, "On using the same key pair for Ed25519 and an X25519 based KEM", 2021).
    """

    identity: SigningKey
    box: SigningKey
    log: SigningKey

    @classmethod
    def of(cls, secret: bytes) -> Self:
        """From the three seeds, SECRET_BYTES together; DecodeError for another length."""
        if len(secret) != SECRET_BYTES:
            raise DecodeError(f"private keys have {len(secret)} bytes instead of {SECRET_BYTES}")
        return cls(*(SigningKey(secret[at : at + KEY_BYTES]) for at in range(0, SECRET_BYTES, KEY_BYTES)))
