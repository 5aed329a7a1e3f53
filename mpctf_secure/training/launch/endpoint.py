"""Where rank 0 of a training job meets its agent: a path says it, that of a Unix socket or that of a ticket for TLS."""

import contextlib
import math
import select
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.training.launch import ticket

START_SECONDS = 3600.0
"""A large model takes long to hash and load; a process that dies before that is noticed at once."""


@dataclass(frozen=True)
class Endpoint:
    """Listens for one rank 0: `accept` waits for so many seconds at most, and is to be asked for `patience` seconds."""

    path: Path
    patience: float
    accept: Callable[[float], socket.socket | None]


@contextlib.contextmanager
def unix() -> Iterator[Endpoint]:
    """A socket in a folder of mode 0700, for this machine's processes, and for machines that ssh forwards it to."""
    with tempfile.TemporaryDirectory(prefix="mpctf-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "job.sock"  # short: sun_path has 108 bytes
        listener.bind(str(path))
        listener.listen(1)

        def accept(seconds: float) -> socket.socket | None:
            """The first to connect."""
            listener.settimeout(seconds)
            with contextlib.suppress(TimeoutError):
                return listener.accept()[0]
            return None

        yield Endpoint(path, START_SECONDS, accept)


@contextlib.contextmanager
def tls(address: str, work: Path) -> Iterator[Endpoint]:
    """TLS at `address`, the ticket in `work`, and no end of patience: jobs wait in queues for days.

    EnvironmentUnfitError where it cannot listen, or not write.
    """
    with ticket.listening(address, work) as (path, accept):
        yield Endpoint(path, math.inf, accept)


def dial(path: Path) -> socket.socket:
    """Rank 0's end; EnvironmentUnfitError where it finds no agent, or one that is not its own."""
    if path.is_file():
        return ticket.dial(path)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        hint = "is the agent gone? With slurm, nodes must see the `work` folder"
        raise EnvironmentUnfitError(f"no agent at {path}: {error.strerror}", hint=hint) from error
    return connection


def wait_readable(connection: socket.socket, seconds: float) -> bool:
    """Whether something can be read within so long; `select` sees nothing of what TLS has decrypted already."""
    pending = isinstance(connection, ssl.SSLSocket) and connection.pending() > 0
    return pending or bool(select.select([connection], [], [], seconds)[0])
