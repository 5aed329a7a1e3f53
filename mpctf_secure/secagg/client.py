"""A participant's end of one attempt, without I/O.

Rules of this file:
- Whatever a method returns is a function of context, identity key, entropy and the messages before. A caller that has
  those on disk before it sends can make the same client again after a crash, by the same calls, and sends the same
  bytes. Each method runs once (`transitions.CLIENT`).
- Every input comes from a server that may lie. It is verified before it changes anything here.
- Keys, the self-mask seed and polynomials are `entropy`, drawn from the operating system for this attempt alone.
- An error ends the attempt for this participant; it names whose message was wrong.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from mpctf_secure.errors import COORDINATOR, SecurityError, blaming
from mpctf_secure.hazmat import aead, agreement, shamir
from mpctf_secure.hazmat.encoding import decode_sequence, enc
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.ids import IdentityKey
from mpctf_secure.secagg.chunks import Lanes
from mpctf_secure.secagg.masks import MaskedInput, box_key, pair_mask, self_mask
from mpctf_secure.secagg.messages import (
    KEY_BYTES,
    MASK_KEY,
    SELF_MASK,
    Advert,
    Dealing,
    Delivery,
    Release,
    ShareMessage,
    SharePair,
    Signed,
    Survivors,
    commitment,
    self_mask_commitment,
)
from mpctf_secure.secagg.parameters import MAX_COHORT, Context, check_ascending
from mpctf_secure.secagg.transitions import CLIENT, ClientState, advance
from mpctf_secure.secagg.verification import check_share, verify_adverts, verify_dealings


class BadBoxError(SecurityError):
    """A dealer signed a box that does not open or whose shares are not those it committed to."""

    def __init__(self, dealer: IdentityKey, why: str) -> None:
        super().__init__(f"shares from a dealer: {why}", culprits=[dealer.hex()])
        self.dealer = dealer


def entropy_bytes(threshold: int) -> int:
    """How much entropy a client of an attempt with this threshold takes: three secrets and two polynomials."""
    return 3 * KEY_BYTES + 2 * (threshold - 1) * shamir.COEFFICIENT_BYTES


@dataclass(frozen=True)
class _Secrets:
    """The attempt's entropy by use; the polynomials' coefficients as `shamir.split` takes them."""

    mask_private: bytes
    share_private: bytes
    self_mask: bytes
    self_mask_polynomial: bytes
    mask_key_polynomial: bytes

    @classmethod
    def of(cls, entropy: bytes, threshold: int) -> Self:
        """Cut the entropy up; ValueError for another length than `entropy_bytes`."""
        if len(entropy) != entropy_bytes(threshold):
            raise ValueError(f"entropy has {len(entropy)} bytes instead of {entropy_bytes(threshold)}")
        stream, polynomial = io.BytesIO(entropy), shamir.COEFFICIENT_BYTES * (threshold - 1)
        return cls(*map(stream.read, (KEY_BYTES, KEY_BYTES, KEY_BYTES, polynomial, polynomial)))

    def __repr__(self) -> str:
        return "_Secrets(…)"


@dataclass
class Client:
    """One participant in one attempt; SecurityError if it is not in the context's cohort."""

    context: Context
    key: SigningKey
    entropy: bytes = field(repr=False)
    state: ClientState = field(default=ClientState.ANNOUNCED, init=False)

    def __post_init__(self) -> None:
        self.me = IdentityKey(self.key.public)
        if self.me not in self.context.cohort:
            raise SecurityError("this participant is not in the cohort", culprits=[COORDINATOR])
        self._ctx = self.context.digest()
        self._secrets = _Secrets.of(self.entropy, self.context.threshold)
        self._my_advert = b""
        self._my_dealing = b""
        self._adverts: Mapping[IdentityKey, Advert] = {}
        self._adverts_hash = b""
        self._shares: dict[IdentityKey, SharePair] = {}  # by dealer; its keys become U2
        self._digest = self._declared = b""
        self._tuple: Survivors | None = None

    def __repr__(self) -> str:
        return f"Client({self.me.hex()[:8]}, {self.state.value})"

    def advertise(self) -> bytes:
        """The signed advert of both public keys."""
        self._advance("advertise")
        keys = (self._secrets.mask_private, self._secrets.share_private)
        self._my_advert = self._sign("advert", Advert(*map(agreement.public_key, keys)).encode())
        return self._my_advert

    def share(self, adverts: bytes) -> bytes:
        """Check everybody's adverts, then deal shares of both secrets: the `ShareMessage` to send."""
        # A server that is honest passes on nothing that it could have refused itself: every flaw is its own.
        with blaming(COORDINATOR, "adverts"):
            messages = decode_sequence(adverts, MAX_COHORT)
            verified = verify_adverts(self.context, messages)
            _check_mine(self._my_advert, messages)
        self._check_floor("advertised keys", verified)
        self._advance("share")
        self._adverts, self._adverts_hash = verified, sha256(adverts)
        message = self._deal()
        self._my_dealing = message.dealing
        return message.encode()

    def mask(self, delivery: bytes, lanes: Lanes, scalars: Lanes) -> MaskedInput:
        """Open my boxes, which fixes U2, and put all masks on the input, if the contract has any."""
        if lanes.shape != (self.context.dimension,) or scalars.shape != (self.context.scalars,):
            raise ValueError("input does not have the announced size")
        shares = self._open(delivery)
        self._check_floor("shared keys", shares)
        self._advance("mask")
        self._shares.update(shares)
        pairs = [
            pair_mask(self._binding, self.me, self._secrets.mask_private, peer, self._adverts[peer].mask_key)
            for peer in sorted(shares)
            if peer != self.me
        ]
        mine = self_mask(self._binding, self.me, self._secrets.self_mask)
        return MaskedInput(self.context.layout, lanes, scalars, (mine, *pairs) if self.context.secure else ())

    def complain(self, dealer: IdentityKey) -> bytes:
        """The signed complaint about a dealer whose box I refused, with which I leave the attempt."""
        return self._sign("complaint", enc(dealer))

    def declare(self, digest: bytes) -> bytes:
        """The signed digest that ends the upload; without it the server may not count me in.

        The same digest again gives the same bytes, since an upload that breaks off is sent again.
        """
        if digest != self._digest:
            self._advance("declare")
            self._digest, self._declared = digest, self._sign("upload", enc(digest))
        return self._declared

    def confirm(self, survivors: bytes) -> bytes:
        """Check the survivor tuple and sign it: the only one I shall sign in this attempt."""
        with blaming(COORDINATOR, "survivor tuple"):
            claim = Survivors.decode(survivors)
            self._check_view(claim)
            self._check_counted(claim)
        self._check_floor("sent masked input", claim.survivors)
        self._advance("confirm")
        self._tuple = claim
        return self._sign("consistency", claim.encode())

    def release(self, signatures: bytes) -> bytes:
        """Release shares once t members of U3 have signed my tuple: of b for U3, of mask keys for the dropouts.

        What is released follows from the signed tuple alone, never from a list in the request, so no request can
        have both kinds of one member (the attack on protocols that ask for a list of survivors).
        """
        if self._tuple is None:
            raise SecurityError("no survivor tuple was confirmed")
        with blaming(COORDINATOR, "confirmations"):
            self._check_signatures(self._tuple, map(Signed.decode, decode_sequence(signatures, MAX_COHORT)))
        self._advance("release")
        released = Release(
            tuple(self._shares[owner].self_mask for owner in self._tuple.survivors),
            tuple(self._shares[owner].mask_key for owner in self._tuple.dropouts),
        )
        return self._sign("release", released.encode())

    @property
    def _binding(self) -> bytes:
        return enc(self._ctx, self._adverts_hash)

    def _advance(self, event: str) -> None:
        self.state = advance(CLIENT, self.state, event)

    def _sign(self, label: str, body: bytes) -> bytes:
        return Signed.make(label, self._ctx, self.key, body).encode()

    def _check_floor(self, deed: str, members: Sequence[IdentityKey] | Mapping[IdentityKey, object]) -> None:
        if len(members) < self.context.floor:
            raise SecurityError(
                f"only {len(members)} participants {deed}, fewer than the floor of {self.context.floor}",
                culprits=[COORDINATOR],
            )

    def _check_view(self, claim: Survivors) -> None:
        """Everybody who signs this tuple has the same keys and masks with the same peers."""
        if claim.adverts_hash != self._adverts_hash or set(claim.dealers) != set(self._shares):
            raise SecurityError("it has other adverts or another U2 than mine")

    def _check_counted(self, claim: Survivors) -> None:
        """My upload is in, as I sent it: else signing would help to open it with my mask key, or to replace it."""
        if self.me not in claim.survivors:
            raise SecurityError("it leaves me out")
        if claim.digests[claim.survivors.index(self.me)] != self._digest:
            raise SecurityError("it has another digest of my upload")

    def _deal(self) -> ShareMessage:
        group = sorted(self._adverts)
        secrets, count = self._secrets, len(self.context.first_cohort)
        self_masks = shamir.split(secrets.self_mask, secrets.self_mask_polynomial, count)
        mask_keys = shamir.split(secrets.mask_private, secrets.mask_key_polynomial, count)
        points = {member: self.context.x_coordinate(member) - 1 for member in group}
        pairs = {member: SharePair(self_masks[x], mask_keys[x]) for member, x in points.items()}
        self._shares[self.me] = pairs[self.me]
        boxes = [self._seal(member, pairs[member]) for member in group if member != self.me]
        dealing = Dealing(
            self._adverts_hash,
            self_mask_commitment(self._ctx, self.me, self._secrets.self_mask),
            tuple(commitment(self._ctx, self.me, m, SELF_MASK, pairs[m].self_mask) for m in group),
            tuple(commitment(self._ctx, self.me, m, MASK_KEY, pairs[m].mask_key) for m in group),
            tuple(map(sha256, boxes)),
        )
        return ShareMessage(self._sign("shares", dealing.encode()), tuple(boxes))

    def _box_key(self, sender: IdentityKey, recipient: IdentityKey) -> bytes:
        peer = recipient if sender == self.me else sender
        return box_key(self._binding, self._secrets.share_private, self._adverts[peer].share_key, sender, recipient)

    def _seal(self, recipient: IdentityKey, pair: SharePair) -> bytes:
        return aead.seal_once(self._box_key(self.me, recipient), pair.encode(), self._associated(self.me, recipient))

    def _associated(self, sender: IdentityKey, recipient: IdentityKey) -> bytes:
        return self._binding + enc("box", sender, recipient)

    def _open(self, delivery: bytes) -> dict[IdentityKey, SharePair]:
        with blaming(COORDINATOR, "delivery"):
            parts = Delivery.decode(delivery)
            _check_mine(self._my_dealing, parts.dealings)
            dealings = verify_dealings(self.context, sorted(self._adverts), self._adverts_hash, parts.dealings)
            others = [dealer for dealer in dealings if dealer != self.me]
            if len(parts.boxes) != len(others):
                raise SecurityError("it has not one box for each dealer")
            boxes = dict(zip(others, parts.boxes, strict=True))
            for dealer, box in boxes.items():
                self._check_box(dealer, dealings[dealer], box)
        opened = {dealer: self._open_box(dealer, dealings[dealer], box) for dealer, box in boxes.items()}
        return {self.me: self._shares[self.me], **opened}

    def _check_box(self, dealer: IdentityKey, dealing: Dealing, box: bytes) -> None:
        boxed_to = [member for member in sorted(self._adverts) if member != dealer]
        if sha256(box) != dealing.boxes[boxed_to.index(self.me)]:
            raise SecurityError("box is not the one its dealer signed")

    def _open_box(self, dealer: IdentityKey, dealing: Dealing, box: bytes) -> SharePair:
        group = sorted(self._adverts)
        try:
            plaintext = aead.open_once(self._box_key(dealer, self.me), box, self._associated(dealer, self.me))
            pair = SharePair.decode(plaintext)
            for kind, share in ((SELF_MASK, pair.self_mask), (MASK_KEY, pair.mask_key)):
                committed = dealing.commitments(kind)[group.index(self.me)]
                check_share(self._ctx, dealer, self.me, kind, share, committed)
        except SecurityError as error:
            raise BadBoxError(dealer, error.message) from error
        return pair

    def _check_signatures(self, claim: Survivors, messages: Iterable[Signed]) -> None:
        body = claim.encode()
        signers = []
        for message in messages:
            message.verify("consistency", self._ctx)
            if message.sender not in claim.survivors or message.body != body:
                raise SecurityError("somebody confirmed another survivor tuple")
            signers.append(message.sender)
        check_ascending(signers, "list of signers")
        if len(signers) < self.context.threshold:
            raise SecurityError(
                f"{len(signers)} survivors confirmed, fewer than the threshold of {self.context.threshold}"
            )


def _check_mine(message: bytes, messages: Sequence[bytes]) -> None:
    if message not in messages:
        raise SecurityError("my own message is missing or replaced")
