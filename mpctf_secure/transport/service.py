"""What both ends of the channel know: method names, options, and errors as statuses."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from mpctf_secure.errors import (
    EnvironmentUnfitError,
    MpctfError,
    ParticipationError,
    SecurityError,
    UsageError,
)

T = TypeVar("T")
SERVICE = "mpctf_secure.v1.Coordinator"
EXCHANGE, UPLOAD, DOWNLOAD = (f"/{SERVICE}/{name}" for name in ("Exchange", "Upload", "Download"))
TLS_VERSION = b"TLSv1.3"

KEEPALIVE = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

_STATUS: dict[type[MpctfError], grpc.StatusCode] = {
    UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    EnvironmentUnfitError: grpc.StatusCode.FAILED_PRECONDITION,
    SecurityError: grpc.StatusCode.PERMISSION_DENIED,
    ParticipationError: grpc.StatusCode.ABORTED,
}
_ERROR = {status: kind for kind, status in _STATUS.items()}


def bind(server: Any, address: str, credentials: Any) -> int:
    """The port that a server got at `address` (IP:port); EnvironmentUnfitError where it cannot be had."""
    try:
        port: int = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise EnvironmentUnfitError(
            f"cannot listen on {address}", hint="is the address one of this machine's, and is the port free?"
        ) from error
    return port


def credentials(state: Callable[[], T], configure: Callable[[T], Any], *, of_clients: bool) -> Any:
    """Server credentials that follow `state`, which gRPC asks for before each handshake, from threads of its own.

    It is given a configuration only where the state is another: a new one while it shakes hands in another thread can
    crash it (github.com/grpc/grpc/issues/36693), and did with fifty sites that came at once.
    """
    lock, last = threading.Lock(), list[T]()

    def changed() -> Any:
        """A configuration, None where the last one still holds."""
        now = state()
        with lock:
            if last == [now]:
                return None
            last[:] = [now]
        return configure(now)

    return grpc.dynamic_ssl_server_credentials(changed(), changed, require_client_authentication=of_clients)


def to_status(error: MpctfError) -> tuple[grpc.StatusCode, str]:
    """(code, details) for an error that the other side should see; the hint travels on a second line."""
    kind = next((kind for kind in type(error).__mro__ if kind in _STATUS), None)
    return (_STATUS[kind] if kind else grpc.StatusCode.INTERNAL), f"{error.message}\n{error.hint}".rstrip()


def from_status(code: grpc.StatusCode, details: str) -> MpctfError | None:
    """The error behind a status, or None where it is the network's and not the coordinator's."""
    message, _, hint = details.partition("\n")
    kind = _ERROR.get(code)
    return kind(f"coordinator: {message}", hint=hint) if kind else None
