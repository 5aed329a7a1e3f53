"""One attempt of secure aggregation in memory, with dropouts at any stage and a server that may be made to lie."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from mpctf_secure.hazmat.encoding import enc_sequence
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.ids import IdentityKey
from mpctf_secure.quorum import default_colluders
from mpctf_secure.secagg import masks
from mpctf_secure.secagg.chunks import LANE_TYPES
from mpctf_secure.secagg.chunks import digest as chunks_digest
from mpctf_secure.secagg.client import Client, entropy_bytes
from mpctf_secure.secagg.messages import Advert, Release, Signed, Survivors
from mpctf_secure.secagg.parameters import Context
from mpctf_secure.secagg.server import Server
from mpctf_secure.secagg.transitions import ServerState

STAGES = ("advertise", "share", "upload", "confirm", "release")


def make_client(context: Context, key: SigningKey) -> Client:
    """A client with reproducible entropy in the place of the operating system's."""
    return Client(
        context, key, hashlib.shake_256(key.public + context.digest()).digest(entropy_bytes(context.threshold))
    )


def make_context(keys: Iterable[SigningKey], *, bits: int = 32, dimension: int = 50, scalars: int = 4) -> Context:
    cohort = tuple(sorted(IdentityKey(key.public) for key in keys))
    return Context(
        run_id="run",
        round=1,
        attempt=1,
        roster_hash=sha256(b"roster"),
        contract_hash=sha256(b"contract"),
        base_model_hash=sha256(b"base"),
        state_hash=sha256(b"state"),
        round_parameters_hash=sha256(b"parameters"),
        schema_hash=sha256(b"schema"),
        ring_bits=bits,
        dimension=dimension,
        scalars=scalars,
        colluders=default_colluders(len(cohort)),
        cohort=cohort,
        first_cohort=cohort,
    )


@dataclass
class Attempt:
    """n participants with known inputs; `drops` says at which stage an index stops answering."""

    n: int
    bits: int = 32
    dimension: int = 50
    drops: dict[int, str] = field(default_factory=dict)
    seed: int = 0
    changes: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = [SigningKey(sha256(f"{self.seed}/{i}".encode())) for i in range(self.n)]
        self.context = replace(make_context(keys, bits=self.bits, dimension=self.dimension), **self.changes)
        self.clients = [make_client(self.context, key) for key in keys]
        self.server = Server(self.context)
        draw = np.random.default_rng(self.seed)
        kind = LANE_TYPES[self.bits]
        self.lanes = [draw.integers(0, 1 << self.bits, self.dimension, dtype=kind) for _ in keys]
        self.scalars = [draw.integers(0, 1 << 64, 4, dtype=np.uint64) for _ in keys]
        self.uploads: dict[IdentityKey, list[bytes]] = {}
        self.transcript: list[bytes] = []  # everything the server received

    def active(self, stage: str) -> list[int]:
        """Who answers in `stage`: whoever does not drop in it or before."""
        gone = {i for i, at in self.drops.items() if STAGES.index(at) <= STAGES.index(stage)}
        return [i for i in range(self.n) if i not in gone]

    def advertise(self) -> bytes:
        for i in self.active("advertise"):
            self.server.accept_advert(self.sent(self.clients[i].advertise()))
        return self.server.close_adverts()

    def share(self, adverts: bytes) -> dict[IdentityKey, bytes]:
        for i in self.active("share"):
            self.server.accept_shares(self.sent(self.clients[i].share(adverts)))
        return self.server.close_shares()

    def upload(self, deliveries: dict[IdentityKey, bytes]) -> bytes:
        for i in self.active("upload"):
            client = self.clients[i]
            chunks = list(client.mask(deliveries[client.me], self.lanes[i], self.scalars[i]).chunks())
            self.transcript.extend(chunks)
            digest = chunks_digest(map(sha256, chunks))
            self.uploads[client.me] = chunks
            self.server.accept_upload(self.sent(client.declare(digest)), digest)
        return self.server.close_uploads()

    def confirm(self, survivors: bytes) -> bytes:
        for i in self.active("confirm"):
            self.server.accept_consistency(self.sent(self.clients[i].confirm(survivors)))
        return self.server.close_consistency()

    def release(self, signatures: bytes) -> tuple[masks.Mask, ...]:
        for i in self.active("release"):
            self.server.accept_release(self.sent(self.clients[i].release(signatures)))
        return self.server.close_releases()

    def sent(self, message: bytes) -> bytes:
        self.transcript.append(message)
        return message

    def opened(self, left: tuple[masks.Mask, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The sum of lanes and of scalars after removing the masks that are left."""
        layout = self.context.layout
        pieces = [self.uploads[member] for member in self.server.survivors]
        per_chunk = enumerate(zip(*pieces, strict=True))
        return layout.join([masks.unmask_chunk(iter(piece), left, layout, number) for number, piece in per_chunk])

    def input(self, client: Client) -> tuple[np.ndarray, np.ndarray]:
        """What a client puts in."""
        index = self.clients.index(client)
        return self.lanes[index], self.scalars[index]

    def open_from(self, claim: Survivors, signers: list[Client], releases: list[Release]) -> np.ndarray:
        """The sum of lanes that a server makes from releases for one tuple."""
        server = Server(self.context)
        server.__dict__ |= vars(self.server) | {"_tuple": claim, "state": ServerState.RELEASES}
        server._releases = {client.me: release for client, release in zip(signers, releases, strict=True)}
        server._received = dict.fromkeys(server._releases, b"")
        pieces = (self.uploads[member][0] for member in claim.survivors)
        opened = masks.unmask_chunk(pieces, server.close_releases(), self.context.layout, 0)
        return np.frombuffer(opened, LANE_TYPES[self.bits])

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        adverts = self.advertise()
        deliveries = self.share(adverts)
        survivors = self.upload(deliveries)
        signatures = self.confirm(survivors)
        return self.opened(self.release(signatures))

    def plain(self) -> tuple[np.ndarray, np.ndarray]:
        """The same sums without any protocol."""
        survivors = self.active("upload")
        lanes = np.zeros_like(self.lanes[0])
        scalars = np.zeros_like(self.scalars[0])
        for i in survivors:
            lanes += self.lanes[i]
            scalars += self.scalars[i]
        return lanes, scalars


def with_advert(attempt: Attempt, index: int, advert: Advert) -> bytes:
    """All adverts, that of participant `index` replaced by one it signs itself: a peer that lies."""
    messages = []
    for i, client in enumerate(attempt.clients):
        body = advert.encode() if i == index else Signed.decode(client.advertise()).body
        messages.append(Signed.make("advert", attempt.context.digest(), client.key, body))
    return enc_sequence(m.encode() for m in sorted(messages, key=lambda m: m.sender))


def in_order(messages: Iterable[bytes]) -> bytes:
    """Signed messages as a server passes them on."""
    return enc_sequence(sorted(messages, key=lambda message: Signed.decode(message).sender))


def tuple_of(attempt: Attempt, members: list[Client]) -> bytes:
    everyone = tuple(sorted(client.me for client in attempt.clients))
    survivors = tuple(sorted(client.me for client in members))
    digests = tuple(chunks_digest(map(sha256, attempt.uploads[m])) for m in survivors)
    return Survivors(members[0]._adverts_hash, everyone, survivors, digests).encode()
