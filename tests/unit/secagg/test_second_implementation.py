"""The package against `plain_secagg`, message for message: frozen transcripts, and attempts in which both take part."""

import hashlib
import json
from pathlib import Path

import numpy as np
import plain_secagg as plain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator import Attempt

from mpctf_secure.hazmat.encoding import decode_sequence
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.ids import IdentityKey
from mpctf_secure.secagg import masks
from mpctf_secure.secagg.chunks import LANE_TYPES, digest
from mpctf_secure.secagg.client import Client, entropy_bytes
from mpctf_secure.secagg.parameters import Context
from mpctf_secure.secagg.server import Server

VECTORS = sorted((Path(__file__).parents[2] / "vectors" / "secagg").glob("*.json"))


def unhex(items: dict[str, str]) -> dict[bytes, bytes]:
    return {bytes.fromhex(member): bytes.fromhex(message) for member, message in items.items()}


def context_of(fields: dict) -> Context:
    hashes = {name: bytes.fromhex(value) for name, value in fields.items() if name.endswith("_hash")}
    groups = {name: tuple(IdentityKey(bytes.fromhex(m)) for m in fields[name]) for name in ("cohort", "first_cohort")}
    return Context(**{**fields, **hashes, **groups})


def plain_context(context: Context) -> dict:
    return {**vars(context), "cohort": list(context.cohort), "first_cohort": list(context.first_cohort)}


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_package_gives_the_frozen_transcript(path: Path) -> None:
    frozen = json.loads(path.read_text())
    context = context_of(frozen["context"])
    assert context.digest().hex() == frozen["ctx"]
    given = {bytes.fromhex(member): secrets for member, secrets in frozen["members"].items()}
    clients = {
        member: Client(context, SigningKey(bytes.fromhex(one["seed"])), bytes.fromhex(one["entropy"]))
        for member, one in given.items()
    }
    server = Server(context)
    adverts = {member: client.advertise() for member, client in clients.items()}
    assert adverts == unhex(frozen["adverts"])
    for message in adverts.values():
        server.accept_advert(message)
    to_all = server.close_adverts()
    assert to_all.hex() == frozen["adverts_to_all"]
    for member, message in unhex(frozen["shares"]).items():
        assert clients[member].share(to_all) == message
        server.accept_shares(message)
    deliveries = server.close_shares()
    assert deliveries == unhex(frozen["deliveries"])
    uploads = {}
    for member, chunks in frozen["chunks"].items():
        owner = bytes.fromhex(member)
        lanes = np.array(given[owner]["lanes"], LANE_TYPES[context.ring_bits])
        masked = clients[owner].mask(deliveries[owner], lanes, np.array(given[owner]["scalars"], np.uint64))
        uploads[owner] = list(masked.chunks())
        assert [chunk.hex() for chunk in uploads[owner]] == chunks
        declared = clients[owner].declare(digest(map(sha256, uploads[owner])))
        assert declared.hex() == frozen["uploads"][member]
        server.accept_upload(declared, digest(map(sha256, uploads[owner])))
    survivors = server.close_uploads()
    assert survivors.hex() == frozen["survivors"]
    for member, message in unhex(frozen["consistency"]).items():
        assert clients[member].confirm(survivors) == message
        server.accept_consistency(message)
    signatures = server.close_consistency()
    assert signatures.hex() == frozen["signatures"]
    for member, message in unhex(frozen["releases"]).items():
        assert clients[member].release(signatures) == message
        server.accept_release(message)
    left, layout = server.close_releases(), context.layout
    per_chunk = enumerate(zip(*(uploads[member] for member in server.survivors), strict=True))
    lanes, scalars = layout.join([masks.unmask_chunk(iter(c), left, layout, number) for number, c in per_chunk])
    assert (lanes.tolist(), scalars.tolist()) == (frozen["sum"]["lanes"], frozen["sum"]["scalars"])


def test_there_are_transcripts() -> None:
    assert len(VECTORS) == 6


class PlainClient:
    """The second implementation with the methods of the package's client."""

    def __init__(self, context: Context, seed: bytes) -> None:
        entropy = hashlib.shake_256(seed).digest(entropy_bytes(context.threshold))
        self._client = plain.Client(plain_context(context), seed, entropy)
        self.me = IdentityKey(self._client.me)
        self.advertise, self.share = self._client.advertise, self._client.share
        self.confirm, self.release = self._client.confirm, self._client.release

    def mask(self, delivery: bytes, lanes: np.ndarray, scalars: np.ndarray) -> "PlainClient":
        self._chunks = self._client.mask(delivery, lanes.tolist(), scalars.tolist())
        return self

    def chunks(self) -> list[bytes]:
        return self._chunks

    def declare(self, upload_digest: bytes) -> bytes:
        assert upload_digest == self._client.digest
        return self._client.declare()


@given(st.data())
@settings(max_examples=25)
def test_both_take_part_in_one_attempt_under_the_package_s_server(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 7))
    bearable = {2: 0, 3: 0, 4: 1, 5: 1, 6: 2, 7: 2}[n]
    gone = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=bearable))
    drops = {i: data.draw(st.sampled_from(["advertise", "share", "upload", "confirm", "release"])) for i in gone}
    attempt = Attempt(n, bits=data.draw(st.sampled_from([16, 32])), dimension=5, drops=drops)
    for i in data.draw(st.sets(st.integers(0, n - 1), min_size=1)):
        attempt.clients[i] = PlainClient(attempt.context, sha256(f"0/{i}".encode()))  # type: ignore[call-overload]
    lanes, scalars = attempt.run()
    assert np.array_equal(lanes, attempt.plain()[0])
    assert np.array_equal(scalars, attempt.plain()[1])


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_package_s_clients_under_the_second_implementation_s_server(n: int) -> None:
    attempt = Attempt(n, bits=16, dimension=9)
    server = plain.Server(plain_context(attempt.context))
    adverts = server.collect_adverts([client.advertise() for client in attempt.clients])
    deliveries = server.collect_shares([client.share(adverts) for client in attempt.clients])
    uploads = {}
    for client, lanes, scalars in zip(attempt.clients, attempt.lanes, attempt.scalars, strict=True):
        chunks = list(client.mask(deliveries[client.me], lanes, scalars).chunks())
        uploads[client.me] = chunks, client.declare(digest(map(sha256, chunks)))
    survivors = server.collect_uploads(uploads)
    signatures = server.collect_consistency([client.confirm(survivors) for client in attempt.clients])
    opened = server.unmask([client.release(signatures) for client in attempt.clients])
    assert opened == tuple(part.tolist() for part in attempt.plain())


def test_vector_of_two_chunks_is_masked_alike() -> None:
    attempt = Attempt(2, bits=16, dimension=(1 << 19) + 3)
    other = PlainClient(attempt.context, sha256(b"0/1"))
    attempt.clients[1] = other  # type: ignore[call-overload]
    assert np.array_equal(attempt.run()[0], attempt.plain()[0])
    assert len(other.chunks()) == 3


def test_complaint_of_the_second_implementation_is_the_package_s() -> None:
    attempt = Attempt(3)
    other, dealer = PlainClient(attempt.context, sha256(b"0/1")), attempt.clients[0].me
    assert other._client.complain(dealer) == attempt.clients[1].complain(dealer)


def test_what_the_package_refuses_the_second_implementation_refuses() -> None:
    """A tuple without the client, one below the floor, adverts without its own."""
    for spoil in ("adverts", "tuple"):
        attempt = Attempt(4)
        other = PlainClient(attempt.context, sha256(b"0/1"))
        attempt.clients[1] = other  # type: ignore[call-overload]
        adverts = attempt.advertise()
        if spoil == "adverts":
            without = plain.seq(m for m in decode_sequence(adverts, 100) if m != other._client.advert)
            with pytest.raises(plain.Refused):
                other.share(without)
            continue
        attempt.upload(attempt.share(adverts))
        claim = plain.enc(sha256(adverts)) + plain.seq(attempt.context.cohort) + plain.seq([]) + plain.seq([])
        with pytest.raises(plain.Refused):
            other.confirm(claim)
