import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpctf_secure.training.launch import endpoint
from mpctf_secure.training.launch.endpoint import Endpoint, TlsEndpoint, connect, has_arrived


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[TlsEndpoint]:
    with TlsEndpoint("127.0.0.1", tmp_path) as opened:
        yield opened


def address_of(opened: Endpoint) -> tuple[str, int]:
    _, host, port, _ = opened.agent.split(":", 3)
    return host, int(port)


def meet(opened: Endpoint) -> tuple[socket.socket, socket.socket]:
    """Rank 0's end, and the agent's."""
    found: list[socket.socket] = []
    thread = threading.Thread(target=lambda: found.append(connect(opened.agent)))
    thread.start()
    ours = opened.accept(20)
    thread.join()
    return found[0], ours


@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_rank_0_and_the_agent_meet_and_talk(kind: str, tmp_path: Path) -> None:
    with Endpoint() if kind == "unix" else TlsEndpoint("127.0.0.1", tmp_path) as opened:
        theirs, ours = meet(opened)
    with theirs, ours:
        theirs.sendall(b"here")
        assert ours.recv(4) == b"here"
        ours.sendall(b"rows" * 5000)
        assert theirs.recv(1) == b"r"
        assert has_arrived(theirs) is (kind == "tls")


def test_the_jobs_key_is_its_owners_alone_and_goes_with_the_endpoint(tmp_path: Path) -> None:
    with TlsEndpoint("127.0.0.1", tmp_path):
        (path,) = tmp_path.glob("job-*.pem")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not list(tmp_path.glob("*"))


def plain(host: str, port: int, folder: Path) -> None:
    socket.create_connection((host, port)).sendall(b"\0" * 100)


def silent(host: str, port: int, folder: Path) -> None:
    SILENT.extend(socket.create_connection((host, port)) for _ in range(20))


def without_certificate(host: str, port: int, folder: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    shake(context, host, port)


def another_job(host: str, port: int, folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    with TlsEndpoint("127.0.0.1", other):
        context = endpoint._context(ssl.PROTOCOL_TLS_CLIENT, next(other.glob("*.pem")))
        context.verify_mode = ssl.CERT_NONE
        shake(context, host, port)


def an_old_protocol(host: str, port: int, folder: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    shake(context, host, port)


def shake(context: ssl.SSLContext, host: str, port: int) -> None:
    with pytest.raises(OSError):  # noqa: PT011
        talk(context, host, port)


def talk(context: ssl.SSLContext, host: str, port: int) -> bytes:
    """In TLS 1.3 the client hears of a refusal only when it reads."""
    with context.wrap_socket(socket.create_connection((host, port))) as connection:
        connection.sendall(b"x")
        return connection.recv(1)


SILENT: list[socket.socket] = []
INTRUDERS = {
    "garbage": plain,
    "silence": silent,
    "no certificate": without_certificate,
    "the key of another job": another_job,
    "TLS 1.2": an_old_protocol,
}


@pytest.mark.parametrize("intrude", INTRUDERS.values(), ids=INTRUDERS.keys())
def test_who_has_not_the_jobs_key_neither_gets_in_nor_keeps_rank_0_out(
    intrude: Callable[[str, int, Path], None], tls: TlsEndpoint, tmp_path: Path
) -> None:
    intrude(*address_of(tls), tmp_path)
    with pytest.raises(TimeoutError):
        tls.accept(0.2)
    theirs, ours = meet(tls)
    with theirs, ours:
        theirs.sendall(b"here")
        assert ours.recv(4) == b"here"
    while SILENT:
        SILENT.pop().close()


def test_rank_0_does_not_talk_to_somebody_else_at_the_agents_port(tls: TlsEndpoint, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with TlsEndpoint("127.0.0.1", other) as imposter:
        _, host, port, _ = imposter.agent.split(":", 3)
        mine = tls.agent.split(":", 3)[3]
        with pytest.raises(OSError):  # noqa: PT011
            connect(f"tls:{host}:{port}:{mine}").recv(1)
