"""Real TLS on loopback: who may talk to the coordinator, and to whom a participant talks."""

import asyncio
import contextlib
import datetime
import math
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from loops import in_loop

from mpctf_secure.errors import EnvironmentUnfitError, MpctfError, SecurityError, UsageError
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import ceremony, certificate, keystore
from mpctf_secure.identity.certificate import TlsKey
from mpctf_secure.identity.keys import Keys
from mpctf_secure.identity.roster import Member, Roster
from mpctf_secure.ids import ParticipantName
from mpctf_secure.transport import client, server, service
from mpctf_secure.transport.client import Channel
from mpctf_secure.transport.server import _Methods, listen
from mpctf_secure.transport.tls import OwnTls

NOW = datetime.datetime.now(datetime.UTC)
NAMES = ("bank-b", "coordinator", "hospital-a")


class Echo:
    """Answers with who it thinks called; "wait" is never answered."""

    waiting = threading.Semaphore(0)

    def __init__(self) -> None:
        self.turned: list[tuple[str, str]] = []

    async def exchange(self, peer: Member, request: bytes) -> bytes:
        if request == b"refuse":
            raise UsageError("row 3 is wrong", hint="mend it")
        if request == b"wait":
            Echo.waiting.release()
            await asyncio.Event().wait()
        return f"{peer.name}:".encode() + request

    async def upload(self, peer: Member, pieces: AsyncIterator[bytes]) -> bytes:
        return b"".join([piece async for piece in pieces])

    async def download(self, peer: Member, request: bytes) -> AsyncIterator[bytes]:
        """ "5:abcdef" breaks off after five bytes, "" behind the colon is no end: a byte a piece."""
        left, _, content = request.partition(b":")
        for number, byte in enumerate(content):
            if left and number == int(left):
                raise EnvironmentUnfitError("the line went dead")
            yield bytes([byte])

    def turned_away(self, caller: str, reason: str) -> None:
        self.turned.append((caller, reason))


@dataclass
class World:
    address: str
    roster: Roster
    keys: dict[str, Keys]
    use: Callable[[Roster], None] = lambda _: None
    handler: Echo = field(default_factory=Echo)

    def member(self, name: str) -> Member:
        return next(member for member in self.roster.members if member.name == name)

    def tls(self, name: str, life: datetime.timedelta = certificate.LIFE) -> OwnTls:
        return OwnTls(self.keys[name].identity, self.member(name), life)

    def channel(self, name: str, tls: OwnTls | None = None, patience: float = 0.5) -> Channel:
        return Channel(self.address, self.roster, tls or self.tls(name), patience)


class Shows:
    """In the place of `OwnTls`: always the same key and certificate."""

    def __init__(self, private: bytes, pem: bytes) -> None:
        self._key = TlsKey(private, pem, NOW)

    def current(self) -> TlsKey:
        return self._key


def serve(
    world: World, tls: OwnTls, ready: Callable[[str, Callable[[Roster], None]], None], stop: threading.Event
) -> None:
    async def main() -> None:
        listener = await listen("127.0.0.1:0", world.roster, tls, world.handler)
        loop = asyncio.get_running_loop()

        def use(other: Roster) -> None:
            done = threading.Event()
            loop.call_soon_threadsafe(lambda: (listener.use(other), done.set()))
            assert done.wait(10)

        ready(f"127.0.0.1:{listener.port}", use)
        await asyncio.to_thread(stop.wait)
        await listener.stop(0)

    asyncio.run(main())


def enrolled(home: Path) -> World:
    roster = ceremony.hold({ParticipantName(n): home / n for n in NAMES}, ParticipantName("coordinator"), NOW, b"x")
    return World("", roster, {name: keystore.unseal(home / name, b"x") for name in NAMES})


@contextlib.contextmanager
def serving(home: Path, server: str = "coordinator", life: datetime.timedelta = certificate.LIFE) -> Iterator[World]:
    world = enrolled(home)
    started, stop = threading.Event(), threading.Event()

    def ready(address: str, use: Callable[[Roster], None]) -> None:
        world.address, world.use = address, use
        started.set()

    thread = threading.Thread(target=serve, args=(world, world.tls(server, life), ready, stop))
    thread.start()
    try:
        assert started.wait(10)
        yield world
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serving(tmp_path_factory.mktemp("homes")) as world:
        yield world


def test_participant_is_known_by_its_tls_key(world: World) -> None:
    channel = world.channel("bank-b")
    assert channel.exchange(b"hello") == b"bank-b:hello"
    assert channel.upload(lambda: iter([b"a", b"b"])) == b"ab"
    assert channel.download(lambda _: b":xyz", 3) == [b"x", b"y", b"z"]
    channel.close()


def test_download_that_goes_on_is_refused(world: World) -> None:
    with pytest.raises(SecurityError, match="goes on after 3 pieces"):
        world.channel("bank-b").download(lambda _: b":" + b"x" * 100_000, 3)


DOWNLOADS = {
    "nothing breaks": (["0 :habcd"], "habcd"),
    "after the header": (["0 1:habcd", "0 :habcd"], "habcd"),
    "two breaks": (["0 3:habcd", "2 2:hcd", "3 :hd"], "habcd"),
    "before the header": (["0 0:habcd", "0 :habcd"], "habcd"),
    "another answer by then": (["0 3:habcd", "2 :jyz", "0 :jxyz"], "jxyz"),
    "another answer that breaks too": (["0 3:habcd", "2 :jyz", "0 2:jxyz", "1 :jyz"], "jxyz"),
}


@pytest.mark.parametrize(("served", "expected"), DOWNLOADS.values(), ids=DOWNLOADS.keys())
def test_download_that_breaks_off_goes_on_where_it_was(world: World, served: list[str], expected: str) -> None:
    """Each line: how many pieces behind the header are said to be here, and what is served then."""
    script = iter(served)

    def request(held: int) -> bytes:
        due, _, answer = next(script).partition(" ")
        assert held == int(due)
        return answer.encode()

    channel = world.channel("bank-b")
    channel.patience = 20
    assert b"".join(channel.download(request, 5)).decode() == expected
    assert not list(script)
    channel.close()


def test_refusal_travels_with_its_hint_and_class(world: World) -> None:
    with pytest.raises(UsageError, match="coordinator: row 3 is wrong") as caught:
        world.channel("bank-b").exchange(b"refuse")
    assert caught.value.hint == "mend it"


def test_name_in_a_certificate_counts_for_nothing(world: World) -> None:
    """A stranger's self-made certificate for bank-b: the handshake fails, since only the roster's identities vouch."""
    stranger = OwnTls(SigningKey(b"\7" * 32), world.member("bank-b"))
    with pytest.raises(SecurityError, match="hangs up on this site's certificate"):
        world.channel("bank-b", stranger, patience=60).exchange(b"hello")


def test_expired_certificate_opens_no_connection(world: World) -> None:
    member, old = world.member("bank-b"), NOW - datetime.timedelta(days=2)
    late = OwnTls(world.keys["bank-b"].identity, member, clock=lambda: old)
    with pytest.raises(SecurityError, match="hangs up on this site's certificate") as caught:
        world.channel("bank-b", late, patience=60).exchange(b"hello")
    assert "are both clocks right?" in caught.value.hint


def test_key_that_was_issued_by_a_wrong_clock_is_replaced_when_the_clock_is_set_right(world: World) -> None:
    clock = [NOW + datetime.timedelta(days=2)]
    own = OwnTls(world.keys["bank-b"].identity, world.member("bank-b"), clock=lambda: clock[0])
    with pytest.raises(SecurityError, match="hangs up on this site's certificate"):
        world.channel("bank-b", own, patience=60).exchange(b"hello")
    clock[0] = datetime.datetime.now(datetime.UTC)
    assert world.channel("bank-b", own).exchange(b"hello") == b"bank-b:hello"


def test_member_that_writes_another_s_name_stays_itself(world: World) -> None:
    own = OwnTls(world.keys["bank-b"].identity, replace(world.member("bank-b"), name=ParticipantName("hospital-a")))
    assert world.channel("bank-b", own).exchange(b"hello") == b"bank-b:hello"


def test_tls_key_cannot_mint_a_certificate(world: World) -> None:
    """bank-b's TLS key, once stolen, is good for a day; it may not sign itself another."""
    own = world.tls("bank-b").current()
    issuer_key = serialization.load_pem_private_key(own.private, None)
    issuer = x509.load_pem_x509_certificate(own.certificate)
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
    shown = Shows(pem, child.public_bytes(serialization.Encoding.PEM))
    with pytest.raises(SecurityError, match="hangs up on this site's certificate"):
        world.channel("hospital-a", shown, patience=60).exchange(b"hello")


def test_certificate_that_the_handshake_takes_and_lives_too_long_is_refused_at_the_call(world: World) -> None:
    """A thief of the identity for a minute must not leave with a TLS key for a year."""
    year = certificate.issue(world.keys["bank-b"].identity, "bank-b", "participant", NOW, datetime.timedelta(days=365))
    with pytest.raises(SecurityError, match="TLS certificate: valid from"):
        world.channel("bank-b", Shows(year.private, year.certificate)).exchange(b"hello")


def test_participant_certificate_does_not_serve_as_coordinator(tmp_path: Path) -> None:
    """A participant that answers at the coordinator's address is not talked to."""
    with serving(tmp_path, server="hospital-a") as world, pytest.raises(SecurityError, match="is not the coordinator"):
        world.channel("bank-b", patience=60).exchange(b"secret")


def test_coordinator_is_not_served_as_a_participant(world: World) -> None:
    with pytest.raises(MpctfError):
        world.channel("coordinator").exchange(b"hello")


def test_both_ends_renew_their_keys_and_talk_on(tmp_path: Path) -> None:
    """Keys that live for three seconds: after two lives the same channel still works, with others."""
    life = datetime.timedelta(seconds=3)  # certificates count whole seconds
    with serving(tmp_path, life=life) as world:
        own = world.tls("bank-b", life)
        channel, seen = world.channel("bank-b", own), set()
        until = time.monotonic() + 2 * life.total_seconds()
        while time.monotonic() < until:
            assert channel.exchange(b"hello") == b"bank-b:hello"
            seen.add(own.current().certificate)
            time.sleep(0.1)  # lives pass by the clock alone
        assert len(seen) >= 3
        channel.close()


def test_revoked_member_is_out_of_a_call_that_waits(tmp_path: Path) -> None:
    with serving(tmp_path) as world:
        channel, errors = world.channel("bank-b"), []

        def wait() -> None:
            try:
                channel.exchange(b"wait")
            except SecurityError as error:
                errors.append(error.message)

        assert channel.exchange(b"hello") == b"bank-b:hello"
        thread = threading.Thread(target=wait)
        thread.start()
        Echo.waiting.acquire(timeout=10)
        rest = tuple(member for member in world.roster.members if member.name != "bank-b")
        world.use(replace(world.roster, version=2, members=rest))
        thread.join(10)
        assert errors == ["coordinator: bank-b is not in roster version 2 under this identity"]
        assert world.handler.turned == []
        with pytest.raises(SecurityError, match="nobody in the roster"):
            channel.exchange(b"hello")
        assert world.handler.turned == [("ipv4:127.0.0.1", "TLS certificate was issued by nobody in the roster")]
        with pytest.raises(SecurityError, match="hangs up on this site's certificate"):
            world.channel("bank-b", patience=60).exchange(b"hello")
        assert world.channel("hospital-a").exchange(b"hello") == b"hospital-a:hello"


@in_loop
async def test_stop_lets_an_answer_on_its_way_arrive_and_waits_for_no_other_call(tmp_path: Path) -> None:
    class Slow(Echo):
        def __init__(self) -> None:
            super().__init__()
            self.sent, self.may_go_on = asyncio.Event(), asyncio.Event()

        async def download(self, peer: Member, request: bytes) -> AsyncIterator[bytes]:
            yield b"header"
            self.sent.set()
            await self.may_go_on.wait()
            yield b"a"
            yield b"b"

    world, handler = enrolled(tmp_path), Slow()
    listener = await listen("127.0.0.1:0", world.roster, world.tls("coordinator"), handler)
    world.address = f"127.0.0.1:{listener.port}"
    downloading = asyncio.create_task(asyncio.to_thread(world.channel("bank-b").download, lambda _: b"", 3))
    waiting = asyncio.create_task(asyncio.to_thread(world.channel("hospital-a").exchange, b"wait"))
    await handler.sent.wait()
    assert await asyncio.to_thread(Echo.waiting.acquire, timeout=10)
    stopping = asyncio.create_task(listener.stop(60))
    with pytest.raises(EnvironmentUnfitError, match="no connection"):
        await waiting
    assert not downloading.done()
    assert not stopping.done()
    handler.may_go_on.set()
    assert await downloading == [b"header", b"a", b"b"]
    await stopping


def test_one_participant_does_not_take_the_places_of_all(tmp_path: Path) -> None:
    with serving(tmp_path) as world:
        greedy, others = world.channel("bank-b"), world.channel("hospital-a")
        threads = [threading.Thread(target=_wait_until_closed, args=(greedy,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert Echo.waiting.acquire(timeout=10)
        with pytest.raises(EnvironmentUnfitError, match="no connection"):
            greedy.exchange(b"one too many")
        assert others.exchange(b"hello") == b"hospital-a:hello"
        world.use(replace(world.roster, version=2, members=world.roster.members[1:]))
        for thread in threads:
            thread.join(10)


def test_one_participant_does_not_take_the_time_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_CALLS_AT_ONCE", 3.0)
    monkeypatch.setattr(server, "_CALLS_A_SECOND", 1e-6)
    with serving(tmp_path) as world:
        greedy, others = world.channel("bank-b"), world.channel("hospital-a")
        for _ in range(3):
            assert greedy.exchange(b"hello") == b"bank-b:hello"
        with pytest.raises(EnvironmentUnfitError, match="no connection"):
            greedy.exchange(b"one too many")
        assert others.exchange(b"hello") == b"hospital-a:hello"


def test_budget_of_calls_comes_back_with_time() -> None:
    budget = server._Budget()
    first = [budget.take(1000.0) for _ in range(401)]
    assert first == [True] * 400 + [False]
    assert [budget.take(1000.5) for _ in range(51)] == [True] * 50 + [False]


def _wait_until_closed(channel: Channel) -> None:
    with contextlib.suppress(MpctfError):
        channel.exchange(b"wait")


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
    pair, own = tmp_path / "pair.pem", world.tls("bank-b").current()
    pair.write_bytes(own.private + own.certificate)
    assert spoken(world, ssl.TLSVersion.TLSv1_3, pair) == "TLSv1.3"
    assert spoken(world, ssl.TLSVersion.TLSv1_2, pair) is None
    assert spoken(world, ssl.TLSVersion.TLSv1_3, None) is None


CALLS: dict[str, tuple[str, bytes, str | None]] = {
    "a participant in TLS 1.3": ("bank-b", b"TLSv1.3", None),
    "a participant in TLS 1.2, should gRPC ever let one in": ("bank-b", b"TLSv1.2", "not TLS 1.3"),
    "the coordinator's own certificate": ("coordinator", b"TLSv1.3", "only participants may call"),
}


@pytest.mark.parametrize(("name", "version", "why"), CALLS.values(), ids=CALLS.keys())
def test_every_call_is_checked_again(world: World, name: str, version: bytes, why: str | None) -> None:
    """What the handshake stops today may pass it tomorrow; here gRPC's word for a connection is put in its mouth."""

    class Call:
        def auth_context(self) -> dict[str, list[bytes]]:
            return {"ssl_tls_version": [version], "x509_pem_cert": [world.tls(name).current().certificate]}

    methods = _Methods(world.roster, world.tls("coordinator"), Echo())
    if why is None:
        assert methods._peer(Call()).name == name
        return
    with pytest.raises(SecurityError, match=why):
        methods._peer(Call())


def test_configuration_is_given_again_only_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one given while another handshake goes on is a chance for gRPC to crash."""
    given: list[Callable[[], object]] = []
    monkeypatch.setattr(service.grpc, "dynamic_ssl_server_credentials", lambda _, fetch, **__: given.append(fetch))
    state = ["first"]
    service.credentials(lambda: state[0], str.upper, of_clients=True)
    assert [given[0](), given[0]()] == [None, None]
    state[0] = "second"
    assert [given[0](), given[0]()] == ["SECOND", None]


def test_expired_roster_serves_nobody_at_either_end(tmp_path: Path) -> None:
    with serving(tmp_path) as world:
        channel = world.channel("bank-b")
        assert channel.exchange(b"hello") == b"bank-b:hello"
        expired = replace(world.roster, expires=NOW)
        with pytest.raises(SecurityError, match="roster version 1 expired"):
            Channel(world.address, expired, world.tls("bank-b")).exchange(b"hello")
        world.use(expired)
        # To whose clock it has not: one of the two clocks is wrong, and may be set right.
        with pytest.raises(EnvironmentUnfitError, match=r"no connection .*: roster version 1 expired"):
            channel.exchange(b"hello")
        assert all("roster version 1 expired" in reason for _, reason in world.handler.turned)
        assert world.handler.turned


def test_stranger_in_the_coordinators_place_ends_the_first_call_and_is_a_break_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that shows a page of its own for a while must not end a site that is in a run."""
    monkeypatch.setattr(client, "_LONGEST_PAUSE", 1.6)

    def stranger(listening: socket.socket) -> None:
        while True:
            try:
                with listening.accept()[0] as connection:
                    connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\n\r\n")
            except OSError:
                return

    world = enrolled(tmp_path)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        threading.Thread(target=stranger, args=(listening,), daemon=True).start()
        world.address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(SecurityError, match=r"is not the coordinator: .* does not speak TLS"):
            world.channel("bank-b", patience=60).exchange(b"hello")
        known, breaks = world.channel("bank-b", patience=math.inf), []

        def gives_up(reason: str) -> None:
            breaks.append(reason)
            known.patience = 0

        known._no_connection = gives_up
        with pytest.raises(EnvironmentUnfitError, match="no connection"):
            known.exchange(b"hello")
        assert "is not the coordinator" in breaks[0]
        listening.shutdown(socket.SHUT_RDWR)


def test_wrong_address_ends_with_a_clear_error(world: World) -> None:
    with pytest.raises(EnvironmentUnfitError, match=r"no connection to the coordinator at 127\.0\.0\.1:9"):
        Channel("127.0.0.1:9", world.roster, world.tls("bank-b"), patience=0.5).exchange(b"hello")
