"""The coordinator's listener: authenticates every call against the roster and hands bytes to a handler."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc

from mpctf_secure.errors import EnvironmentUnfitError, MpctfError, SecurityError
from mpctf_secure.identity import certificate
from mpctf_secure.identity.keystore import Keys
from mpctf_secure.identity.roster import Member, Roster
from mpctf_secure.transport.service import DOWNLOAD, EXCHANGE, KEEPALIVE, TLS_VERSION, UPLOAD, to_status


class Handler(Protocol):
    """What answers the three methods; `peer` is the authenticated participant."""

    async def exchange(self, peer: Member, request: bytes) -> bytes:
        """One message, one answer."""

    async def upload(self, peer: Member, pieces: AsyncIterator[bytes]) -> bytes:
        """A masked input in chunks, then one answer."""

    def download(self, peer: Member, request: bytes) -> AsyncIterator[bytes]:
        """A published sum in chunks."""


class Listener:
    """A running gRPC server; `port` is the one it got."""

    def __init__(self, server: Any, port: int) -> None:
        self._server = server
        self.port = port

    async def stop(self, grace_seconds: float) -> None:
        """Let open calls end within the grace period."""
        await self._server.stop(grace_seconds)


async def listen(address: str, roster: Roster, keys: Keys, handler: Handler) -> Listener:
    """Serve on `address` (IP:port); EnvironmentUnfitError where the port is not free."""
    # Without SO_REUSEPORT a second coordinator on one port fails instead of stealing half of the calls.
    options = (("grpc.so_reuseport", 0), ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000), *KEEPALIVE)
    # A participant has one call waiting, and for moments a second one.
    most_calls = 4 * len(roster.participants)
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=most_calls)
    server.add_generic_rpc_handlers((_Methods(roster, handler),))
    try:
        port = server.add_secure_port(address, _credentials(roster, keys))
    except RuntimeError as error:
        raise EnvironmentUnfitError(
            f"cannot listen on {address}", hint="the port is in use or not yours; choose another in `listen`"
        ) from error
    await server.start()
    return Listener(server, port)


def _credentials(roster: Roster, keys: Keys) -> Any:
    clients = b"".join(certificate.to_pem(member.certificate) for member in roster.participants)
    pair = (keys.tls_key_pem, certificate.to_pem(keys.tls_certificate))
    return grpc.ssl_server_credentials([pair], root_certificates=clients, require_client_auth=True)


class _Methods(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, roster: Roster, handler: Handler) -> None:
        self._roster = roster
        self._handler = handler
        self._methods = {
            EXCHANGE: grpc.unary_unary_rpc_method_handler(self._exchange),
            UPLOAD: grpc.stream_unary_rpc_method_handler(self._upload),
            DOWNLOAD: grpc.unary_stream_rpc_method_handler(self._download),
        }

    def service(self, handler_call_details: Any) -> Any:
        """The method that a call names, None where there is none such."""
        return self._methods.get(handler_call_details.method)

    async def _exchange(self, request: bytes, context: Any) -> bytes:
        async with _refusing(context):
            return await self._handler.exchange(self._peer(context), request)
        return b""

    async def _upload(self, pieces: AsyncIterator[bytes], context: Any) -> bytes:
        async with _refusing(context):
            return await self._handler.upload(self._peer(context), pieces)
        return b""

    async def _download(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        async with _refusing(context):
            async for piece in self._handler.download(self._peer(context), request):
                yield piece

    def _peer(self, context: Any) -> Member:
        """Who calls, from the TLS key: names in a certificate are what its owner wrote there."""
        session = context.auth_context()
        if session.get("ssl_tls_version") != [TLS_VERSION]:
            raise SecurityError("connection is not TLS 1.3")
        pem = next(iter(session.get("x509_pem_cert", [])), b"")
        member = self._roster.by_spki(certificate.spki_hash(certificate.from_pem(pem)))
        if member.role != "participant":
            raise SecurityError("only participants may call the coordinator", culprits=[member.name])
        return member


@contextlib.asynccontextmanager
async def _refusing(context: Any) -> AsyncIterator[None]:
    try:
        yield
    except MpctfError as error:
        await context.abort(*to_status(error))
