"""The coordinator's end of one attempt, without I/O: it checks, sorts and forwards, and learns only the sum.

Rules of this file:
- `accept_*` takes one participant's message: stored if it is good; SecurityError naming the sender if not. The same
  bytes again change nothing; other bytes from the same sender are refused, for nobody may say two things.
- `close_*` ends a stage with those who made it and returns what goes out; ParticipationError below the floor.
- When a stage closes is not decided here: clocks and connections are the caller's.
- Vectors never pass through here; the caller spools them and brings the digest of what it holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from mpctf_secure.errors import ParticipationError, SecurityError, blaming
from mpctf_secure.hazmat.encoding import Reader, enc, enc_sequence
from mpctf_secure.hazmat.kdf import HASH_BYTES, sha256
from mpctf_secure.ids import IdentityKey
from mpctf_secure.secagg.masks import Mask, pair_mask, self_mask
from mpctf_secure.secagg.messages import (
    KEY_BYTES,
    MASK_KEY,
    SELF_MASK,
    Advert,
    Dealing,
    Delivery,
    Release,
    ShareMessage,
    Signed,
    Survivors,
)
from mpctf_secure.secagg.parameters import Context
from mpctf_secure.secagg.proof import BadDealerError, DealerProof
from mpctf_secure.secagg.transitions import SERVER, ServerState, advance
from mpctf_secure.secagg.verification import check_share, recover, verify_adverts, verify_dealings


@dataclass
class Server:
    """The server of one attempt."""

    context: Context
    state: ServerState = field(default=ServerState.ADVERTS, init=False)

    def __post_init__(self) -> None:
        self._ctx = self.context.digest()
        self._received: dict[IdentityKey, bytes] = {}  # of the stage that is open, verified
        self._adverts: dict[IdentityKey, Advert] = {}  # U1
        self._adverts_message = self._adverts_hash = b""
        self._public_keys: set[bytes] = set()
        self._dealings: dict[IdentityKey, Dealing] = {}  # U2
        self._signed_dealings: dict[IdentityKey, bytes] = {}
        self._complaints: dict[IdentityKey, IdentityKey] = {}  # who refused a box → its dealer
        self._tuple: Survivors | None = None
        self._releases: dict[IdentityKey, Release] = {}

    @property
    def expected(self) -> tuple[IdentityKey, ...]:
        """Who may still say something in the stage that is open."""
        match self.state:
            case ServerState.ADVERTS:
                return self.context.cohort
            case ServerState.SHARES:
                return tuple(self._adverts)
            case ServerState.UPLOADS:
                return tuple(self._dealings)
        return self.survivors

    @property
    def received(self) -> frozenset[IdentityKey]:
        """Whose message of this stage is in."""
        return frozenset(self._received)

    @property
    def survivors(self) -> tuple[IdentityKey, ...]:
        """U3, whose inputs make the sum; empty before masked input closes."""
        return self._tuple.survivors if self._tuple else ()

    @property
    def claim(self) -> Survivors | None:
        """The tuple that survivors sign; None before masked input closes."""
        return self._tuple

    def accept_advert(self, data: bytes) -> None:
        """One signed advert."""
        message = self._verified(ServerState.ADVERTS, "advert", data)
        if self._is_new(message.sender, data):
            advert = verify_adverts(self.context, [data])[message.sender]
            # Here and not when the stage closes: two colluders with one key would end the attempt for everybody.
            if {advert.mask_key, advert.share_key} & self._public_keys:
                raise SecurityError("advert repeats somebody's public key", culprits=[message.sender.hex()])
            self._public_keys |= {advert.mask_key, advert.share_key}
            self._received[message.sender] = data

    def close_adverts(self) -> bytes:
        """Fix U1; returns the adverts that go to each of its members."""
        self._close("close_adverts", self.context.floor)
        ordered = [data for _, data in sorted(self._received.items())]
        self._adverts = verify_adverts(self.context, ordered)
        adverts = enc_sequence(ordered)
        self._adverts_hash = sha256(adverts)
        self._adverts_message = adverts
        self._received = {}
        return adverts

    def accept_shares(self, data: bytes) -> None:
        """One `ShareMessage`: the dealing is verified, the boxes are what it signs."""
        parts = ShareMessage.decode(data)
        message = self._verified(ServerState.SHARES, "shares", parts.dealing)
        if self._is_new(message.sender, data):
            dealings = verify_dealings(self.context, tuple(self._adverts), self._adverts_hash, [parts.dealing])
            if tuple(map(sha256, parts.boxes)) != dealings[message.sender].boxes:
                raise SecurityError("boxes are not those the dealer signed", culprits=[message.sender.hex()])
            self._received[message.sender] = data

    def close_shares(self) -> dict[IdentityKey, bytes]:
        """Fix U2; returns for each of its members the dealings and the boxes addressed to it."""
        self._close("close_shares", self.context.floor)
        parts = {dealer: ShareMessage.decode(data) for dealer, data in sorted(self._received.items())}
        dealings = [message.dealing for message in parts.values()]
        self._signed_dealings = dict(zip(parts, dealings, strict=True))
        self._dealings = verify_dealings(self.context, tuple(self._adverts), self._adverts_hash, dealings)
        self._received = {}
        return {member: Delivery(tuple(dealings), tuple(self._boxes_to(member, parts))).encode() for member in parts}

    def accept_complaint(self, data: bytes) -> tuple[IdentityKey, bool]:
        """Somebody leaves over a dealer's box: the dealer, and whether more complained of it than may collude.

        Then one of them is honest, and those complain only of a box that its dealer signed: the dealer is at fault.
        """
        message = self._verified(ServerState.UPLOADS, "complaint", data)
        with Reader(message.body) as reader:
            dealer = IdentityKey(reader.bytes(KEY_BYTES))
        sender = message.sender
        if dealer not in self._dealings or sender in self._received or self._complaints.get(sender, dealer) != dealer:
            raise SecurityError("complaint does not go with what its sender said before", culprits=[sender.hex()])
        self._complaints[sender] = dealer
        return dealer, list(self._complaints.values()).count(dealer) > self.context.colluders

    def accept_upload(self, data: bytes, digest: bytes) -> None:
        """One signed upload digest, with the digest of the bytes that the caller really holds."""
        message = self._verified(ServerState.UPLOADS, "upload", data)
        if message.sender in self._complaints:
            raise SecurityError("upload after a complaint", culprits=[message.sender.hex()])
        with Reader(message.body) as reader:
            declared = reader.bytes(HASH_BYTES)
        _check_digest(declared, digest, message.sender)
        if self._is_new(message.sender, data):
            self._received[message.sender] = data

    def close_uploads(self) -> bytes:
        """Fix U3; returns the survivor tuple that each of its members must sign."""
        self._close("close_uploads", self.context.floor)
        survivors = tuple(sorted(self._received))
        digests = tuple(Reader(Signed.decode(self._received[m]).body).bytes(HASH_BYTES) for m in survivors)
        self._tuple = Survivors(self._adverts_hash, tuple(sorted(self._dealings)), survivors, digests)
        self._received = {}
        return self._tuple.encode()

    def accept_consistency(self, data: bytes) -> None:
        """One signature over the survivor tuple."""
        message = self._verified(ServerState.CONSISTENCY, "consistency", data)
        if message.body != self._survivor_tuple.encode():
            raise SecurityError("confirmation is of another survivor tuple", culprits=[message.sender.hex()])
        if self._is_new(message.sender, data):
            self._received[message.sender] = data

    def close_consistency(self) -> bytes:
        """Returns the signatures that let each survivor release."""
        self._close("close_consistency", self.context.threshold)
        signatures = enc_sequence(data for _, data in sorted(self._received.items()))
        self._received = {}
        return signatures

    def accept_release(self, data: bytes) -> None:
        """One survivor's shares, each checked against its dealer's commitment."""
        message = self._verified(ServerState.RELEASES, "release", data)
        if self._is_new(message.sender, data):
            release = Release.decode(message.body)
            self._check_release(message.sender, release)
            self._received[message.sender] = data
            self._releases[message.sender] = release

    def close_releases(self) -> tuple[Mask, ...]:
        """Reconstruct; returns the masks that are still on the sum of the survivors' uploads.

        BadDealerError for shares that match a dealer's commitments and give another secret than it announced.
        """
        self._close("close_releases", self.context.threshold)
        claim = self._survivor_tuple
        chosen = sorted(self._releases)[: self.context.threshold]
        masks = []
        for index, owner in enumerate(claim.survivors):
            shares = {member: self._releases[member].self_masks[index] for member in chosen}
            masks.append(self_mask(self._binding, owner, self._recover(SELF_MASK, owner, shares)))
        for index, owner in enumerate(claim.dropouts):
            shares = {member: self._releases[member].mask_keys[index] for member in chosen}
            masks.extend(self._pair_masks(owner, self._recover(MASK_KEY, owner, shares)))
        return tuple(masks) if self.context.secure else ()

    @property
    def _survivor_tuple(self) -> Survivors:
        if self._tuple is None:
            raise SecurityError(f"no survivor tuple yet in stage {self.state.value}")
        return self._tuple

    @property
    def _binding(self) -> bytes:
        return enc(self._ctx, self._adverts_hash)

    def _verified(self, due: ServerState, label: str, data: bytes) -> Signed:
        if self.state is not due:
            raise SecurityError(f"{label} message came in stage {self.state.value}")
        message = Signed.decode(data)
        message.verify(label, self._ctx)
        if message.sender not in self.expected:
            raise SecurityError(f"{label} message from somebody outside this stage", culprits=[message.sender.hex()])
        return message

    def _is_new(self, sender: IdentityKey, data: bytes) -> bool:
        known = self._received.get(sender)
        if known is not None and known != data:
            raise SecurityError("a second, different message in one stage", culprits=[sender.hex()])
        return known is None

    def _close(self, event: str, least: int) -> None:
        missing = [member.hex() for member in self.expected if member not in self._received]
        if len(self._received) < least:
            raise ParticipationError(
                f"{len(self._received)} participants finished stage {self.state.value}, {least} are needed",
                culprits=missing,
            )
        self.state = advance(SERVER, self.state, event)

    def _boxes_to(self, recipient: IdentityKey, parts: dict[IdentityKey, ShareMessage]) -> Iterable[bytes]:
        for dealer, message in parts.items():
            if dealer != recipient:
                others = [member for member in self._adverts if member != dealer]
                yield message.boxes[others.index(recipient)]

    def _check_release(self, sender: IdentityKey, release: Release) -> None:
        claim = self._survivor_tuple
        if (len(release.self_masks), len(release.mask_keys)) != (len(claim.survivors), len(claim.dropouts)):
            raise SecurityError("release has not one share for each member", culprits=[sender.hex()])
        index = list(self._adverts).index(sender)
        released = [
            *((SELF_MASK, owner, share) for owner, share in zip(claim.survivors, release.self_masks, strict=True)),
            *((MASK_KEY, owner, share) for owner, share in zip(claim.dropouts, release.mask_keys, strict=True)),
        ]
        with blaming(sender.hex(), "release"):
            for kind, owner, share in released:
                check_share(self._ctx, owner, sender, kind, share, self._dealings[owner].commitments(kind)[index])

    def _recover(self, kind: str, owner: IdentityKey, shares: dict[IdentityKey, bytes]) -> bytes:
        try:
            return recover(self.context, kind, owner, self._adverts[owner], self._dealings[owner], shares)
        except SecurityError as error:
            proof = DealerProof.make(self._adverts_message, self._signed_dealings[owner], kind, shares)
            raise BadDealerError(error.message, owner, proof) from error

    def _pair_masks(self, dropout: IdentityKey, private: bytes) -> Iterable[Mask]:
        for survivor in self.survivors:
            mask = pair_mask(self._binding, dropout, private, survivor, self._adverts[survivor].mask_key)
            # The survivor's input holds the mask with the sign that is opposite to the dropout's.
            yield Mask(mask.vector_seed, mask.scalar_seed, not mask.added)


def _check_digest(declared: bytes, received: bytes, sender: IdentityKey) -> None:
    if declared != received:
        raise SecurityError("upload is not what its digest says", culprits=[sender.hex()])
