"""Proof that a dealer dealt shares which do not give the secret it announced.

Its parts are the dealer's own signed words and shares that match them, so it convicts without trust in who shows it,
and an honest dealer cannot be convicted while SHA-256 and Ed25519 hold. It opens nothing of anybody else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from mpctf_secure.errors import DecodeError, SecurityError
from mpctf_secure.hazmat.encoding import Reader, decode_sequence, enc, enc_sequence
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.shamir import SHARE_BYTES
from mpctf_secure.ids import IdentityKey
from mpctf_secure.secagg.messages import MASK_KEY, SELF_MASK, Signed, members
from mpctf_secure.secagg.parameters import MAX_COHORT, Context, check_ascending
from mpctf_secure.secagg.verification import check_share, recover, verify_adverts, verify_dealings


@dataclass(frozen=True)
class DealerProof:
    """The signed adverts of U1, the dealer's signed `shares`, and t shares of one of its secrets."""

    adverts: bytes
    dealing: bytes
    kind: str
    holders: tuple[IdentityKey, ...]
    shares: tuple[bytes, ...]

    @classmethod
    def make(cls, adverts: bytes, dealing: bytes, kind: str, shares: Mapping[IdentityKey, bytes]) -> Self:
        """From what a server holds."""
        holders = tuple(sorted(shares))
        return cls(adverts, dealing, kind, holders, tuple(shares[holder] for holder in holders))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse; `convict` is what checks."""
        with Reader(data) as reader:
            proof = cls(
                reader.bytes(),
                reader.bytes(),
                reader.text(limit=16),
                members(reader),
                tuple(reader.sequence(SHARE_BYTES, MAX_COHORT)),
            )
        if proof.kind not in {SELF_MASK, MASK_KEY}:
            raise DecodeError("proof is about no known kind of secret")
        return proof

    def encode(self) -> bytes:
        """The bytes that travel."""
        return enc(self.adverts, self.dealing, self.kind) + enc_sequence(self.holders) + enc_sequence(self.shares)

    @property
    def dealer(self) -> IdentityKey:
        """Against whom it is; DecodeError where that cannot be read."""
        return Signed.decode(self.dealing).sender

    def convict(self, context: Context) -> IdentityKey:
        """The dealer at fault; SecurityError where this proves nothing, which is the fault of whoever shows it.

        1. U1 and the dealing are signed, and the dealing is of this U1.
        2. There are exactly t shares, of distinct members of U1, and each matches the dealer's commitment.
        3. They do not give the secret that the dealer announced.
        """
        adverts = verify_adverts(context, decode_sequence(self.adverts, MAX_COHORT))
        verified = verify_dealings(context, list(adverts), sha256(self.adverts), [self.dealing])
        dealer, dealing = next(iter(verified.items()))
        shares = self._verified_shares(context, list(adverts), dealer, dealing.commitments(self.kind))
        try:
            recover(context, self.kind, dealer, adverts[dealer], dealing, shares)
        except SecurityError:
            return dealer
        raise SecurityError("the dealer did nothing wrong")

    def _verified_shares(
        self, context: Context, group: list[IdentityKey], dealer: IdentityKey, commitments: tuple[bytes, ...]
    ) -> dict[IdentityKey, bytes]:
        check_ascending(self.holders, "holders of shares")
        if not len(self.holders) == len(self.shares) == context.threshold or not set(self.holders) <= set(group):
            raise SecurityError("not the shares of a threshold of members")
        for holder, share in zip(self.holders, self.shares, strict=True):
            check_share(context.digest(), dealer, holder, self.kind, share, commitments[group.index(holder)])
        return dict(zip(self.holders, self.shares, strict=True))


class BadDealerError(SecurityError):
    """A dealer's shares gave another secret; `proof` convicts it before anybody."""

    def __init__(self, message: str, dealer: IdentityKey, proof: DealerProof) -> None:
        super().__init__(message, culprits=[dealer.hex()])
        self.dealer = dealer
        self.proof = proof
