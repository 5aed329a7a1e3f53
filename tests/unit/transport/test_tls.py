"""Real TLS on loopback: who may talk to the coordinator, and to whom a participant talks."""

import asyncio
import datetime
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mpctf_secure.errors import EnvironmentUnfitError, MpctfError, SecurityError, UsageError
from mpctf_secure.identity import ceremony, certificate, keystore
from mpctf_secure.identity.roster import Member, Roster
from mpctf_secure.ids import ParticipantName
from mpctf_secure.transport.client import Channel
from mpctf_secure.transport.server import listen

NOW = datetime.datetime.now(datetime.UTC)
NAMES = ("bank-b", "coordinator", "hospital-a")


class Echo:
    """Answers with who it thinks called."""

    async def exchange(self, peer: Member, request: bytes) -> bytes:
        if request == b"refuse":
            raise UsageError("row 3 is wrong", hint="mend it")
        return f"{peer.name}:".encode() + request

    async def upload(self, peer: Member, pieces: AsyncIterator[bytes]) -> bytes:
        return b"".join([piece async for piece in pieces])

    async def download(self, peer: Member, request: bytes) -> AsyncIterator[bytes]:
        for byte in request:
            yield bytes([byte])


@dataclass
class World:
    address: str
    roster: Roster
    keys: dict[str, keystore.Keys]

    def channel(self, name: str, **changes: object) -> Channel:
        return Channel(self.address, self.roster, replace(self.keys[name], **changes), patience=0.5)


def serve(roster: Roster, keys: keystore.Keys, ready: Callable[[str], None], stop: threading.Event) -> None:
    async def main() -> None:
        listener = await listen("127.0.0.1:0", roster, keys, Echo())
        ready(f"127.0.0.1:{listener.port}")
        await asyncio.to_thread(stop.wait)
        await listener.stop(0)

    asyncio.run(main())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home: Path = tmp_path_factory.mktemp("homes")
    folders = {ParticipantName(name): home / name for name in NAMES}
    roster = ceremony.hold(folders, ParticipantName("coordinator"), NOW)
    keys = {name: keystore.load(home / name) for name in NAMES}
    address: list[str] = []
    started, stop = threading.Event(), threading.Event()
    ready = lambda where: (address.append(where), started.set())  # noqa: E731
    thread = threading.Thread(target=serve, args=(roster, keys["coordinator"], ready, stop))
    thread.start()
    assert started.wait(10)
    yield World(address[0], roster, keys)
    stop.set()
    thread.join()


def test_participant_is_known_by_its_tls_key(world: World) -> None:
    channel = world.channel("bank-b")
    assert channel.exchange(b"hello") == b"bank-b:hello"
    assert channel.upload(lambda: iter([b"a", b"b"])) == b"ab"
    assert channel.download(b"xyz", 3) == [b"x", b"y", b"z"]
    channel.close()


def test_download_that_goes_on_is_refused(world: World) -> None:
    with pytest.raises(SecurityError, match="goes on after 3 pieces"):
        world.channel("bank-b").download(b"x" * 100_000, 3)


def test_refusal_travels_with_its_hint_and_class(world: World) -> None:
    with pytest.raises(UsageError, match="coordinator: row 3 is wrong") as caught:
        world.channel("bank-b").exchange(b"refuse")
    assert caught.value.hint == "mend it"


def test_name_in_a_certificate_counts_for_nothing(world: World) -> None:
    """A stranger's self-made certificate for bank-b: the handshake fails, since only pinned ones are trusted."""
    key, der = certificate.make("bank-b", NOW)
    with pytest.raises(EnvironmentUnfitError, match="no connection"):
        world.channel("bank-b", tls_key_pem=key, tls_certificate=der).exchange(b"hello")


def test_member_cannot_mint_a_certificate_for_another(world: World, tmp_path: Path) -> None:
    """bank-b's pinned certificate is a trust anchor, but it may not sign others."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    issuer_key = serialization.load_pem_private_key(world.keys["bank-b"].tls_key_pem, None)
    issuer = x509.load_der_x509_certificate(world.keys["bank-b"].tls_certificate)
    child_key = ec.generate_private_key(ec.SECP256R1())
    child = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hospital-a")]))
        .issuer_name(issuer.subject)
        .public_key(child_key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - datetime.timedelta(hours=1))
        .not_valid_after(NOW + datetime.timedelta(hours=1))
        .sign(issuer_key, hashes.SHA256())
    )
    pem = child_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises((EnvironmentUnfitError, SecurityError)):
        world.channel(
            "hospital-a", tls_key_pem=pem, tls_certificate=child.public_bytes(serialization.Encoding.DER)
        ).exchange(b"hello")


def test_participant_certificate_does_not_serve_as_coordinator(world: World) -> None:
    """A participant that answers at the coordinator's address is not talked to."""
    impostor_stop, started, address = threading.Event(), threading.Event(), []
    ready = lambda where: (address.append(where), started.set())  # noqa: E731
    thread = threading.Thread(target=serve, args=(world.roster, world.keys["hospital-a"], ready, impostor_stop))
    thread.start()
    assert started.wait(10)
    try:
        with pytest.raises(EnvironmentUnfitError, match="no connection"):
            Channel(address[0], world.roster, world.keys["bank-b"], patience=0.5).exchange(b"secret")
    finally:
        impostor_stop.set()
        thread.join()


def test_coordinator_is_not_served_as_a_participant(world: World) -> None:
    with pytest.raises(MpctfError):
        world.channel("coordinator").exchange(b"hello")


def spoken(world: World, version: ssl.TLSVersion, certificate_file: Path | None) -> str | None:
    """The TLS version in which the coordinator's HTTP/2 answered, None if it hung up."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = version
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if certificate_file:
        context.load_cert_chain(certificate_file)
    host, _, port = world.address.partition(":")
    try:
        with socket.create_connection((host, int(port)), 5) as raw, context.wrap_socket(raw) as secured:
            secured.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            return secured.version() if secured.recv(1) else None
    except (ssl.SSLError, ConnectionError):
        return None


def test_only_tls_1_3_with_a_certificate_is_answered(world: World, tmp_path: Path) -> None:
    pair, keys = tmp_path / "pair.pem", world.keys["bank-b"]
    pair.write_bytes(keys.tls_key_pem + certificate.to_pem(keys.tls_certificate))
    assert spoken(world, ssl.TLSVersion.TLSv1_3, pair) == "TLSv1.3"
    assert spoken(world, ssl.TLSVersion.TLSv1_2, pair) is None
    assert spoken(world, ssl.TLSVersion.TLSv1_3, None) is None


def test_wrong_address_ends_with_a_clear_error(world: World) -> None:
    with pytest.raises(EnvironmentUnfitError, match=r"no connection to the coordinator at 127\.0\.0\.1:9"):
        Channel("127.0.0.1:9", world.roster, world.keys["bank-b"], patience=0.5).exchange(b"hello")
