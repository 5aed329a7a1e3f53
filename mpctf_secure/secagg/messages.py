"""The messages of one attempt: bodies, and the signed envelope they travel in.

A decoder is total: any bytes give a message or a DecodeError. Sets are ordered by identity key, so that one value
has one encoding and a signature over it is a signature over the value.
"""

from dataclasses import dataclass
from typing import Self

from mpctf_secure.errors import SecurityError, blaming
from mpctf_secure.hazmat import signature
from mpctf_secure.hazmat.encoding import Reader, enc, enc_sequence
from mpctf_secure.hazmat.kdf import HASH_BYTES, sha256
from mpctf_secure.hazmat.shamir import SHARE_BYTES
from mpctf_secure.hazmat.signature import SIGNATURE_BYTES, SigningKey
from mpctf_secure.ids import IdentityKey
from mpctf_secure.secagg.parameters import MAX_COHORT, check_ascending

KEY_BYTES = 32
SELF_MASK, MASK_KEY = "self-mask", "mask-key"
"""The two secrets that are shared, as commitments name them."""


@dataclass(frozen=True)
class Signed:
    """enc(label, ctx, sender, body, signature); the signature covers everything before it."""

    label: str
    ctx: bytes
    sender: IdentityKey
    body: bytes
    signature: bytes

    @classmethod
    def make(cls, label: str, ctx: bytes, key: SigningKey, body: bytes) -> Self:
        """Sign `body` for one purpose and one context."""
        sender = IdentityKey(key.public)
        return cls(label, ctx, sender, body, key.sign(enc(label, ctx, sender, body)))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse without trusting; `verify` comes next."""
        with Reader(data) as reader:
            label, ctx, sender = reader.text(limit=32), reader.bytes(HASH_BYTES), IdentityKey(reader.bytes(KEY_BYTES))
            return cls(label, ctx, sender, reader.bytes(), reader.bytes(SIGNATURE_BYTES))

    def encode(self) -> bytes:
        """The bytes that travel."""
        return enc(self.label, self.ctx, self.sender, self.body, self.signature)

    def verify(self, label: str, ctx: bytes) -> None:
        """Refuse another purpose, another context or a signature that is not the sender's.

        The caller still owes: is the sender a member of the set that may say this?
        """
        culprits = (self.sender.hex(),)
        if self.label != label:
            raise SecurityError(f"got a {self.label} message where {label} was due", culprits=culprits)
        if self.ctx != ctx:
            raise SecurityError(f"{label} message belongs to another context", culprits=culprits)
        with blaming(self.sender.hex(), f"{label} message"):
            signature.verify(self.sender, enc(self.label, self.ctx, self.sender, self.body), self.signature)


@dataclass(frozen=True)
class Advert:
    """Both public keys of one participant for one attempt, raw X25519."""

    mask_key: bytes
    share_key: bytes

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse the body of an `advert`."""
        with Reader(body) as reader:
            return cls(reader.bytes(KEY_BYTES), reader.bytes(KEY_BYTES))

    def encode(self) -> bytes:
        """The body of an `advert`."""
        return enc(self.mask_key, self.share_key)


@dataclass(frozen=True)
class Dealing:
    """What a dealer says to everybody about its shares, in the order of U1.

    `adverts_hash` says which U1 the dealer saw, so that a server that shows two is blamed and not the dealer.
    `self_mask` commits to b itself, the two lists to each member's share; `boxes` are the hashes of the boxes to all
    members but the dealer.
    """

    adverts_hash: bytes
    self_mask: bytes
    self_mask_shares: tuple[bytes, ...]
    mask_key_shares: tuple[bytes, ...]
    boxes: tuple[bytes, ...]

    def commitments(self, kind: str) -> tuple[bytes, ...]:
        """To every member's share of one of the secrets."""
        return {SELF_MASK: self.self_mask_shares, MASK_KEY: self.mask_key_shares}[kind]

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse the body of a `shares` message."""
        with Reader(body) as reader:
            return cls(
                reader.bytes(HASH_BYTES),
                reader.bytes(HASH_BYTES),
                tuple(reader.sequence(HASH_BYTES, MAX_COHORT)),
                tuple(reader.sequence(HASH_BYTES, MAX_COHORT)),
                tuple(reader.sequence(HASH_BYTES, MAX_COHORT)),
            )

    def encode(self) -> bytes:
        """The body of a `shares` message."""
        lists = (self.self_mask_shares, self.mask_key_shares, self.boxes)
        return enc(self.adverts_hash, self.self_mask) + b"".join(map(enc_sequence, lists))


def commitment(ctx: bytes, dealer: bytes, recipient: bytes, kind: str, value: bytes) -> bytes:
    """SHA-256 over the dealer's value for one recipient; hiding because every value has 256 bits of entropy."""
    return sha256(enc("commitment", ctx, dealer, recipient, kind, value))


def self_mask_commitment(ctx: bytes, dealer: bytes, self_mask: bytes) -> bytes:
    """The commitment for b itself, against which the server checks what it reconstructs."""
    return commitment(ctx, dealer, b"", "self-mask-seed", self_mask)


@dataclass(frozen=True)
class SharePair:
    """The plaintext of a box: one member's share of each secret of the dealer."""

    self_mask: bytes
    mask_key: bytes

    @classmethod
    def decode(cls, plaintext: bytes) -> Self:
        """Parse an opened box."""
        with Reader(plaintext) as reader:
            return cls(reader.bytes(SHARE_BYTES), reader.bytes(SHARE_BYTES))

    def encode(self) -> bytes:
        """The plaintext of a box."""
        return enc(self.self_mask, self.mask_key)

    def __repr__(self) -> str:
        return "SharePair(…)"


@dataclass(frozen=True)
class Survivors:
    """The tuple that everybody signs before anything is opened: who is in, and with which upload."""

    adverts_hash: bytes
    dealers: tuple[IdentityKey, ...]  # U2
    survivors: tuple[IdentityKey, ...]  # U3
    digests: tuple[bytes, ...]  # of U3, in its order

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse the body of a `consistency` message; orders and sizes are checked here, membership by the caller."""
        with Reader(body) as reader:
            result = cls(
                reader.bytes(HASH_BYTES),
                members(reader),
                members(reader),
                tuple(reader.sequence(HASH_BYTES, MAX_COHORT)),
            )
        for group in (result.dealers, result.survivors):
            check_ascending(group, "survivor tuple")
        if len(result.digests) != len(result.survivors) or not set(result.survivors) <= set(result.dealers):
            raise SecurityError("survivor tuple does not fit together")
        return result

    def encode(self) -> bytes:
        """The body of a `consistency` message."""
        lists = (self.dealers, self.survivors, self.digests)
        return enc(self.adverts_hash) + b"".join(map(enc_sequence, lists))

    @property
    def hash(self) -> bytes:
        """By which the audit log names it."""
        return sha256(self.encode())

    @property
    def dropouts(self) -> tuple[IdentityKey, ...]:
        """U2 ∖ U3: dealt shares, but sent no masked input."""
        return tuple(member for member in self.dealers if member not in self.survivors)


@dataclass(frozen=True)
class Release:
    """One participant's shares: of b for U3, of the mask key for U2 ∖ U3, never both of one member."""

    self_masks: tuple[bytes, ...]
    mask_keys: tuple[bytes, ...]

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse the body of a `release`."""
        with Reader(body) as reader:
            return cls(tuple(reader.sequence(SHARE_BYTES, MAX_COHORT)), tuple(reader.sequence(SHARE_BYTES, MAX_COHORT)))

    def encode(self) -> bytes:
        """The body of a `release`."""
        return enc_sequence(self.self_masks) + enc_sequence(self.mask_keys)

    def __repr__(self) -> str:
        return "Release(…)"


@dataclass(frozen=True)
class Delivery:
    """What the server hands one participant after share keys: every dealing of U2, and the boxes addressed to it."""

    dealings: tuple[bytes, ...]  # signed `shares` messages, ascending by dealer
    boxes: tuple[bytes, ...]  # from the same dealers but the recipient itself

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse; each part is verified by the participant."""
        with Reader(body) as reader:
            return cls(tuple(reader.sequence(max_items=MAX_COHORT)), tuple(reader.sequence(max_items=MAX_COHORT)))

    def encode(self) -> bytes:
        """The bytes that travel."""
        return enc_sequence(self.dealings) + enc_sequence(self.boxes)


@dataclass(frozen=True)
class ShareMessage:
    """What a participant sends in share keys: its signed dealing and one box per other member of U1."""

    dealing: bytes
    boxes: tuple[bytes, ...]

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse; the server checks the dealing's signature and the boxes' hashes."""
        with Reader(data) as reader:
            return cls(reader.bytes(), tuple(reader.sequence(max_items=MAX_COHORT)))

    def encode(self) -> bytes:
        """The bytes that travel, and that are stored before they do."""
        return enc(self.dealing) + enc_sequence(self.boxes)


def members(reader: Reader) -> tuple[IdentityKey, ...]:
    """The next field as identities, no more than a cohort may have; the caller checks their order."""
    return tuple(map(IdentityKey, reader.sequence(KEY_BYTES, MAX_COHORT)))
