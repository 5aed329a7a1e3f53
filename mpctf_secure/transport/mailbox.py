"""The mailbox of a ceremony: a listener of its own, on which strangers leave and fetch small public files.

Only the server shows a certificate, since who enrols is in no roster yet. Nothing is believed because it was here:
people compare words. So all that it must withstand is abuse.
"""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grpc

from mpctf_secure.errors import EnvironmentUnfitError, MpctfError
from mpctf_secure.hazmat.encoding import decode_sequence, enc_sequence
from mpctf_secure.identity import certificate
from mpctf_secure.identity.certificate import TlsKey
from mpctf_secure.identity.documents import MOST_BYTES
from mpctf_secure.identity.roster import Member
from mpctf_secure.transport.service import bind, credentials, from_status, to_status
from mpctf_secure.transport.tls import OwnTls

MOST_FILES = 300
_SERVICE = "mpctf_secure.v1.Mailbox"
_PUT, _GET = f"/{_SERVICE}/Put", f"/{_SERVICE}/Get"
_MOST_CALLS = 16
_SECONDS = 30.0
_FRAMES = 4096  # for lengths around the files of an answer


class Store(Protocol):
    """Where the files lie."""

    def put(self, data: bytes, sender: str) -> None:
        """Keep a file from a network address, or refuse it."""

    def files(self) -> Iterator[bytes]:
        """All of them."""


class _Methods(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, store: Store) -> None:
        self._store = store
        self._one_at_a_time = asyncio.Lock()
        self._methods = {
            _PUT: grpc.unary_unary_rpc_method_handler(self._put),
            _GET: grpc.unary_stream_rpc_method_handler(self._get),
        }

    def service(self, handler_call_details: Any) -> Any:
        """The method that a call names, None where there is none such."""
        return self._methods.get(handler_call_details.method)

    async def _put(self, request: bytes, context: Any) -> bytes:
        sender = context.peer().rpartition(":")[0]
        try:
            async with self._one_at_a_time:  # a bad file may take a second, and much memory, to refuse
                await asyncio.to_thread(self._store.put, request, sender)
        except MpctfError as error:
            await context.abort(*to_status(error))
        return b""

    async def _get(self, _request: bytes, _context: Any) -> Any:
        for data in self._store.files():
            yield enc_sequence([data])


async def serve(address: str, tls: OwnTls, store: Store) -> Any:
    """A running gRPC server and its port; EnvironmentUnfitError where the port is not free."""
    options = (
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", MOST_BYTES),
        # Whoever only holds calls open blocks the others for a minute at the most.
        ("grpc.max_connection_age_ms", int(1000 * _SECONDS)),
        ("grpc.max_connection_age_grace_ms", int(1000 * _SECONDS)),
    )
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=_MOST_CALLS)
    server.add_generic_rpc_handlers((_Methods(store),))

    def configure(own: TlsKey) -> Any:
        return grpc.ssl_server_certificate_configuration([(own.private, own.certificate)])

    port = bind(server, address, credentials(tls.current, configure, of_clients=False))
    await server.start()
    return server, port


class Mailbox:
    """A client of somebody's mailbox."""

    def __init__(self, address: str, coordinator: Member) -> None:
        credentials = grpc.ssl_channel_credentials(root_certificates=certificate.trust_anchor(coordinator.identity))
        options = (
            ("grpc.ssl_target_name_override", coordinator.name),
            ("grpc.max_receive_message_length", MOST_BYTES + _FRAMES),
        )
        self._address = address
        self._channel = grpc.secure_channel(address, credentials, options=options)

    def put(self, data: bytes) -> None:
        """Leave a file."""
        try:
            self._channel.unary_unary(_PUT)(data, timeout=_SECONDS)
        except grpc.RpcError as error:
            raise self._failed(error) from error

    def files(self) -> Sequence[bytes]:
        """What lies there, at most MOST_FILES; nothing in it is to be believed."""
        try:
            pieces = list(itertools.islice(self._channel.unary_stream(_GET)(b"", timeout=_SECONDS), MOST_FILES))
        except grpc.RpcError as error:
            raise self._failed(error) from error
        return [data for piece in pieces for data in decode_sequence(piece, 1)]

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _failed(self, error: Any) -> MpctfError:
        refused = from_status(error.code(), error.details() or "")
        hint = "is the mailbox open, and is the coordinator's request file the right one?"
        return refused or EnvironmentUnfitError(f"no mailbox at {self._address}", hint=hint)
