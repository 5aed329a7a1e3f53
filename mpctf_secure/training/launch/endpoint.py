"""Where rank 0 meets the agent: a Unix socket, or TLS 1.3 for a job that runs wherever Slurm puts it.

TLS: key and self-signed certificate are made for one start of a job, and lie in one file of mode 0600 on the disk that
login and compute nodes share. Both ends have them, trust nothing else, and prove that they do: whoever cannot read this
user's files gets no further than the handshake.
"""

import contextlib
import datetime
import queue
import secrets
import socket
import ssl
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mpctf_secure import files

_TLS = "tls:"
_HANDSHAKE_SECONDS = 10.0
_MOST_HANDSHAKES = 64
_DAYS = datetime.timedelta(days=365)  # longer than any job; the file goes with it


class Endpoint:
    """An open Unix socket in a folder that only this user can enter."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        # Short: sun_path has 108 bytes.
        folder = self._undo.enter_context(tempfile.TemporaryDirectory(prefix="mpctf-"))
        self.agent = str(Path(folder) / "job.sock")
        """For `connect`."""
        self._listener = self._undo.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(self.agent)
        self._listener.listen(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Nobody else gets in."""
        self._undo.close()

    def accept(self, seconds: float) -> socket.socket:
        """Rank 0's connection; TimeoutError if it has not come by then."""
        self._listener.settimeout(seconds)
        return self._listener.accept()[0]


class TlsEndpoint(Endpoint):
    """An open port at `address`; the job's key and certificate are in `folder` until this is left."""

    def __init__(self, address: str, folder: Path) -> None:
        self._undo = contextlib.ExitStack()
        path = folder / f"job-{secrets.token_hex(8)}.pem"
        files.create(path, _make_pem())
        self._undo.callback(path.unlink, missing_ok=True)
        self._context = _context(ssl.PROTOCOL_TLS_SERVER, path)
        self._listener = self._undo.enter_context(socket.create_server((address, 0), backlog=_MOST_HANDSHAKES))
        self.agent = f"{_TLS}{address}:{self._listener.getsockname()[1]}:{path}"
        self._shaken: queue.Queue[socket.socket] = queue.Queue()
        self._shaking = threading.Semaphore(_MOST_HANDSHAKES)
        threading.Thread(target=self._listen, name="endpoint", daemon=True).start()

    def accept(self, seconds: float) -> socket.socket:
        """The first connection of somebody who has the job's key; TimeoutError if there is none by then."""
        try:
            return self._shaken.get(timeout=seconds)
        except queue.Empty as error:
            raise TimeoutError from error

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed: rank 0 is here, or the job has failed
            while True:
                raw = self._listener.accept()[0]
                # Each by itself, so that one who connects and says nothing does not keep rank 0 out.
                if self._shaking.acquire(blocking=False):
                    threading.Thread(target=self._shake, args=(raw,), daemon=True).start()
                else:
                    raw.close()

    def _shake(self, raw: socket.socket) -> None:
        try:
            raw.settimeout(_HANDSHAKE_SECONDS)
            connection = self._context.wrap_socket(raw, server_side=True)
            connection.settimeout(None)
            self._shaken.put(connection)
        except (OSError, ValueError):
            raw.close()
        finally:
            self._shaking.release()


def connect(agent: str) -> socket.socket:
    """The other end: to what an endpoint calls `agent`; OSError where nobody is there or it is somebody else."""
    if not agent.startswith(_TLS):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(agent)
        return connection
    address, port, path = agent.removeprefix(_TLS).split(":", 2)
    raw = socket.create_connection((address, int(port)), _HANDSHAKE_SECONDS)
    connection = _context(ssl.PROTOCOL_TLS_CLIENT, Path(path)).wrap_socket(raw)
    connection.settimeout(None)
    return connection


def _context(protocol: int, path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate itself is what is expected, whatever it calls itself
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(path)
    context.load_verify_locations(path)
    return context


def _make_pem() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mpctf-secure job")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    certificate = (
        builder.not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + _DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)


def has_arrived(connection: socket.socket) -> bool:
    """Whether bytes lie in the connection itself, where `select` does not see them."""
    return isinstance(connection, ssl.SSLSocket) and connection.pending() > 0
