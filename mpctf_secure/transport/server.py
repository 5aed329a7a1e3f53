"""The coordinator's listener: authenticates every call against the roster and hands bytes to a handler."""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import grpc

from mpctf_secure.errors import EnvironmentUnfitError, MpctfError, SecurityError
from mpctf_secure.identity import certificate
from mpctf_secure.identity.certificate import TlsKey
from mpctf_secure.identity.roster import Member, Roster
from mpctf_secure.ids import IdentityKey
from mpctf_secure.transport.service import (
    DOWNLOAD,
    EXCHANGE,
    KEEPALIVE,
    TLS_VERSION,
    UPLOAD,
    bind,
    credentials,
    to_status,
)
from mpctf_secure.transport.tls import OwnTls, utc_now

_CONNECTION_SECONDS = 3600
_MOST_CALLS = 4  # of one participant: it has one waiting, and for moments others
_MOMENT_SECONDS = 0.5
_CALLS_A_SECOND, _CALLS_AT_ONCE = 100.0, 400.0


class Handler(Protocol):
    """What answers the three methods; `peer` is the authenticated participant."""

    async def exchange(self, peer: Member, request: bytes) -> bytes:
        """One message, one answer."""

    async def upload(self, peer: Member, pieces: AsyncIterator[bytes]) -> bytes:
        """A masked input in chunks, then one answer."""

    def download(self, peer: Member, request: bytes) -> AsyncIterator[bytes]:
        """A published sum in chunks."""

    def turned_away(self, caller: str, reason: str) -> None:
        """A call got no further than this: of a participant, or from a network address whose owner is in no roster."""


class Listener:
    """A running gRPC server; `port` is the one it got."""

    def __init__(self, server: Any, port: int, methods: "_Methods") -> None:
        self._server = server
        self._methods = methods
        self.port = port

    def use(self, roster: Roster) -> None:
        """Another roster is in force: for new connections, for every call, and for those that wait at this moment."""
        self._methods.use(roster)

    async def stop(self, grace_seconds: float) -> None:
        """Let answers that are on their way out end within the grace period; calls that wait are repeated elsewhere."""
        stopping = asyncio.create_task(self._server.stop(grace_seconds))
        await asyncio.wait({stopping}, timeout=_MOMENT_SECONDS)
        self._methods.end()
        await stopping


async def listen(address: str, roster: Roster, tls: OwnTls, handler: Handler) -> Listener:
    """Serve on `address` (IP:port); EnvironmentUnfitError where the port is not free."""
    options = (
        # Without SO_REUSEPORT a second coordinator on one port fails instead of stealing half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        # A handshake now and then, with the certificates of that moment; calls that are open go on.
        ("grpc.max_connection_age_ms", _CONNECTION_SECONDS * 1000),
        *KEEPALIVE,
    )
    most_calls = _MOST_CALLS * len(roster.participants)
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=most_calls)
    methods = _Methods(roster, tls, handler)
    server.add_generic_rpc_handlers((methods,))
    port = bind(server, address, methods.credentials())
    await server.start()
    return Listener(server, port, methods)


class _Budget:
    """A token bucket: _CALLS_AT_ONCE calls, and _CALLS_A_SECOND more every second."""

    def __init__(self) -> None:
        self._left, self._at = _CALLS_AT_ONCE, 0.0

    def take(self, now: float) -> bool:
        """Whether another call is within it; `now` in seconds of a clock that never goes back."""
        self._left = min(_CALLS_AT_ONCE, self._left + (now - self._at) * _CALLS_A_SECOND)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


@dataclass(eq=False)
class _Call:
    """A call of a participant, which ends at `limit`."""

    peer: Member
    limit: asyncio.Timeout
    is_answering: bool = False


class _Methods(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, roster: Roster, tls: OwnTls, handler: Handler) -> None:
        self._roster = roster
        self._tls = tls
        self._handler = handler
        self._calls: list[_Call] = []
        self._ending = False
        self._budgets: defaultdict[IdentityKey, _Budget] = defaultdict(_Budget)
        self._methods = {
            EXCHANGE: grpc.unary_unary_rpc_method_handler(self._exchange),
            UPLOAD: grpc.stream_unary_rpc_method_handler(self._upload),
            DOWNLOAD: grpc.unary_stream_rpc_method_handler(self._download),
        }

    def service(self, handler_call_details: Any) -> Any:
        """The method that a call names."""
        method = handler_call_details.method
        return self._methods.get(method) or grpc.unary_unary_rpc_method_handler(partial(self._unknown, method))

    def credentials(self) -> Any:
        """What handshakes use: this end's key, and whom it trusts, of that moment."""
        return credentials(lambda: (self._tls.current(), self._roster), _configure, of_clients=True)

    def use(self, roster: Roster) -> None:
        """See `Listener.use`."""
        self._roster = roster
        self._end(call for call in self._calls if call.peer not in roster.members)

    def end(self) -> None:
        """Nobody waits any longer."""
        self._ending = True
        self._end(call for call in self._calls if not call.is_answering)

    def _end(self, calls: Iterable["_Call"]) -> None:
        for call in calls:
            call.limit.reschedule(asyncio.get_running_loop().time())

    async def _exchange(self, request: bytes, context: Any) -> bytes:
        async with self._answering(context) as call:
            return await self._handler.exchange(call.peer, request)
        return b""

    async def _unknown(self, method: str, _: bytes, context: Any) -> bytes:
        async with self._answering(context) as call:
            self._handler.turned_away(call.peer.name, "a call of no method")
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"there is no {method}")
        return b""

    async def _upload(self, pieces: AsyncIterator[bytes], context: Any) -> bytes:
        async with self._answering(context) as call:
            return await self._handler.upload(call.peer, pieces)
        return b""

    async def _download(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        async with self._answering(context) as call:
            async for piece in self._handler.download(call.peer, request):
                call.is_answering = True
                yield piece

    @contextlib.asynccontextmanager
    async def _answering(self, context: Any) -> AsyncIterator["_Call"]:
        """Who calls; the call ends when that member leaves the roster, and errors become statuses."""
        try:
            peer = self._admitted(context)
            # Else one participant could take the places, or the time, of all.
            if [call.peer for call in self._calls].count(peer) >= _MOST_CALLS:
                await self._limit(context, peer, f"{_MOST_CALLS} calls are open")
            if not self._budgets[peer.identity].take(time.monotonic()):
                await self._limit(context, peer, f"over {_CALLS_A_SECOND:g} calls a second")
            async with asyncio.timeout(None) as limit:
                call = _Call(peer, limit)
                self._calls.append(call)
                try:
                    yield call
                finally:
                    self._calls.remove(call)
        except TimeoutError:
            if self._ending:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator has stopped")
            gone = SecurityError(f"{peer.name} is not in roster version {self._roster.version} under this identity")
            await context.abort(*to_status(gone))
        except EnvironmentUnfitError as error:
            # A full disk here is nothing that ends a participant: it comes again.
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
        except MpctfError as error:
            await context.abort(*to_status(error))

    async def _limit(self, context: Any, peer: Member, reason: str) -> None:
        self._handler.turned_away(peer.name, reason)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)

    def _admitted(self, context: Any) -> Member:
        try:
            return self._peer(context)
        except MpctfError as error:
            host, _, _ = str(context.peer()).rpartition(":")
            self._handler.turned_away(host, error.message)
            raise

    def _peer(self, context: Any) -> Member:
        """Who calls, at this call and not only at the handshake: the identity that issued the TLS key.

        Names in a certificate are what its owner wrote there.
        """
        session = context.auth_context()
        if session.get("ssl_tls_version") != [TLS_VERSION]:
            raise SecurityError("connection is not TLS 1.3")
        pem, now = next(iter(session.get("x509_pem_cert", [])), b""), utc_now()
        identity = certificate.issuer(pem, self._roster.roles, now)
        try:
            self._roster.check_unexpired(now)
        except SecurityError as error:  # or the clock is wrong here: whoever calls sees for itself, and may wait
            raise EnvironmentUnfitError(error.message) from error
        member = self._roster.by_identity(identity)
        if member.role != "participant":
            raise SecurityError("only participants may call the coordinator", culprits=[member.name])
        return member


def _configure(state: tuple[TlsKey, Roster]) -> Any:
    own, roster = state
    anchors = b"".join(certificate.trust_anchor(member.identity) for member in roster.participants)
    return grpc.ssl_server_certificate_configuration([(own.private, own.certificate)], root_certificates=anchors)
