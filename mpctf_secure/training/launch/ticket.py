"""TLS 1.3 between an agent and rank 0 of its job on a cluster, each with a certificate for this one start, both pinned.

Rank 0's ticket is a file of mode 0600 with all it needs to dial. A file system that the agent's machine shares with the
compute nodes carries it there; it is gone once rank 0 has come. On a cluster's network everybody can dial: who shows
another certificate, or none, is sent away, and the agent goes on listening.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import secrets
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mpctf_secure import files
from mpctf_secure.errors import EnvironmentUnfitError

HANDSHAKE_SECONDS = 10.0
MOST_GUESTS = 256
_BACKLOG = 128
_DIAL_SECONDS, _DIAL_PAUSE = 30.0, 1.0
_PROBE_SECONDS, _DEAD_SECONDS = 15, 60


class Credentials(NamedTuple):
    """A private key and its certificate, both PEM."""

    private: str
    certificate: str

    @classmethod
    def draw(cls, name: str) -> "Credentials":
        """Fresh ones. Their dates mean nothing: they end with the job, which may wait for weeks, and clocks differ."""
        key = ec.generate_private_key(ec.SECP256R1())
        full_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(full_name)
            .issuer_name(full_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))
            .not_valid_after(datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return cls(private.decode(), certificate.public_bytes(pem).decode())


class Ticket(NamedTuple):
    """Where the agent listens, the certificate it will show, and rank 0's own credentials."""

    address: str
    port: int
    agent: str
    private: str
    certificate: str


@contextlib.contextmanager
def listening(address: str, work: Path) -> Iterator[tuple[Path, Callable[[float], socket.socket | None]]]:
    """The ticket's path, and what waits for rank 0 for so many seconds at most; all of it ends with the block.

    EnvironmentUnfitError where the address is not this machine's, or the folder cannot be written to.
    """
    agent, rank_0 = Credentials.draw("agent"), Credentials.draw("rank 0")
    context = make_context(ssl.PROTOCOL_TLS_SERVER, agent, rank_0.certificate)
    _sweep(work)
    path = work.absolute() / f"agent-{secrets.token_hex(8)}.tls"
    with _listen(address) as listener, contextlib.closing(_Guests(listener, context)) as guests:
        ticket = Ticket(address, listener.getsockname()[1], agent.certificate, *rank_0)
        with files.writing(path):
            files.create(path, json.dumps(ticket._asdict()).encode())
        try:
            yield path, guests.accept
        finally:
            path.unlink(missing_ok=True)


def dial(path: Path) -> ssl.SSLSocket:
    """Rank 0's end; tried for a while, as strangers may crowd the agent.

    EnvironmentUnfitError where the agent is gone or cannot be reached, or somebody else listens in its place.
    """
    ticket = Ticket(**json.loads(path.read_text()))
    own = Credentials(ticket.private, ticket.certificate)
    context = make_context(ssl.PROTOCOL_TLS_CLIENT, own, ticket.agent)
    deadline = time.monotonic() + _DIAL_SECONDS
    while True:
        try:
            return _dial_once(ticket, context)
        except OSError as error:
            if time.monotonic() > deadline:
                hint = "can this node reach the agent's machine at slurm.listen, on any port?"
                raise EnvironmentUnfitError(
                    f"no agent at {ticket.address}:{ticket.port}: {error}", hint=hint
                ) from error
            time.sleep(_DIAL_PAUSE)


def make_context(protocol: int, own: Credentials, peer: str) -> ssl.SSLContext:
    """The peer's certificate is the only one that is trusted, and no authority for others: so it is pinned."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=peer)
    with os.fdopen(os.memfd_create("credentials"), "w") as memory:  # OpenSSL wants a file: this one is on no disk
        memory.write(own.private + own.certificate)
        memory.flush()
        context.load_cert_chain(f"/proc/self/fd/{memory.fileno()}")
    return context


class _Guests:
    """Handshakes with all comers side by side: one that is silent keeps nobody waiting."""

    def __init__(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        self._listener, self._context = listener, context
        self._arrivals: dict[ssl.SSLSocket, float] = {}  # in the order in which they came

    def accept(self, seconds: float) -> socket.socket | None:
        """The first that has shown rank 0's certificate."""
        ready = select.select([self._listener, *self._arrivals], [], [], seconds)[0]
        for guest in [one for one in self._arrivals if one in ready]:
            if self._is_rank_0(guest):
                return guest
        if self._listener in ready:  # one at a time: a crowd cannot push out who came a moment before
            self._welcome()
        self._send_away_the_late()
        return None

    def close(self) -> None:
        """All others go."""
        for guest in self._arrivals:
            guest.close()

    def _welcome(self) -> None:
        with contextlib.suppress(OSError):  # gone already
            connection = self._listener.accept()[0]
            connection.setblocking(False)
            guest = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            self._arrivals[guest] = time.monotonic()

    def _is_rank_0(self, guest: ssl.SSLSocket) -> bool:
        try:
            guest.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError:
            self._send_away(guest)
            return False
        del self._arrivals[guest]
        _settle(guest)
        return True

    def _send_away_the_late(self) -> None:
        now, crowd = time.monotonic(), len(self._arrivals) - MOST_GUESTS
        for place, (guest, came) in enumerate(list(self._arrivals.items())):
            if place < crowd or now - came > HANDSHAKE_SECONDS:
                self._send_away(guest)

    def _send_away(self, guest: ssl.SSLSocket) -> None:
        del self._arrivals[guest]
        guest.close()


def _listen(address: str) -> socket.socket:
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    try:
        listener = socket.create_server((address, 0), family=family, backlog=_BACKLOG)
    except OSError as error:
        hint = "it is the address of the agent's machine that compute nodes reach"
        raise EnvironmentUnfitError(f"slurm.listen: {address}: {error.strerror}", hint=hint) from error
    listener.setblocking(False)
    return listener


def _dial_once(ticket: Ticket, context: ssl.SSLContext) -> ssl.SSLSocket:
    connection = context.wrap_socket(socket.create_connection((ticket.address, ticket.port), HANDSHAKE_SECONDS))
    _settle(connection)
    return connection


def _settle(connection: ssl.SSLSocket) -> None:
    """It may wait without end, but not for a machine that lost its power: that one says no goodbye."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_SECONDS * 1000)


def _sweep(work: Path) -> None:
    """Tickets of an agent that was killed; they let nobody in any more."""
    for left in work.glob("agent-*.tls"):
        left.unlink()
