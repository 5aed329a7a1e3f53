"""A participant's channel to the coordinator: dials out, retries while the network blinks, never changes a message."""

import math
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import grpc

from mpctf_secure.errors import COORDINATOR, EnvironmentUnfitError, MpctfError, SecurityError
from mpctf_secure.identity import certificate
from mpctf_secure.identity.certificate import TlsKey
from mpctf_secure.identity.roster import Roster
from mpctf_secure.transport.probe import hangs_up, probe
from mpctf_secure.transport.service import DOWNLOAD, EXCHANGE, KEEPALIVE, UPLOAD, from_status
from mpctf_secure.transport.tls import OwnTls, utc_now

T = TypeVar("T")
PATIENCE_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 15.0
_LASTED_SECONDS = 60.0
_DICE = random.SystemRandom()
_SHORT_SECONDS = 5.0
_MOST_REASON = 300
_SURE = 4  # looks one after the other at which somebody else answers, or hangs up


class NoConnectionError(EnvironmentUnfitError):
    """Nobody has answered for too long."""


class Channel:
    """One connection; every call may be repeated, since the coordinator answers equal messages equally."""

    def __init__(
        self,
        address: str,
        roster: Roster,
        tls: OwnTls,
        patience: float = PATIENCE_SECONDS,
        no_connection: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.patience = patience
        """Seconds of one break after which a call gives up; may be infinite. `no_connection` is told why it goes on."""
        self._no_connection = no_connection
        self._strange = 0
        self._roster = roster
        self._tls = tls
        self._address = address
        self._lock = threading.Lock()
        self._open: tuple[TlsKey, Any] | None = None
        self._retired: list[tuple[TlsKey, Any]] = []

    def _method(self, kind: str, name: str) -> Callable[..., Any]:
        """A method over a connection with the TLS key of this moment."""
        self._roster.check_unexpired(utc_now())
        own = self._tls.current()
        with self._lock:  # a heart beats in another thread
            if self._open is None or self._open[0] is not own:
                # Not closed yet: a call may wait in the old one, whose key is good for as long again.
                for _, channel in self._retired:
                    channel.close()
                self._retired = [self._open] if self._open else []
                self._open = own, self._connect(own)
            method: Callable[..., Any] = getattr(self._open[1], kind)(name)
        return method

    def _connect(self, own: TlsKey) -> Any:
        # The only trust anchor is the coordinator's own key, so no other member can pose as it.
        credentials = grpc.ssl_channel_credentials(
            root_certificates=certificate.trust_anchor(self._roster.coordinator.identity),
            private_key=own.private,
            certificate_chain=own.certificate,
        )
        options = (
            ("grpc.ssl_target_name_override", self._roster.coordinator.name),
            ("grpc.initial_reconnect_backoff_ms", 500),
            ("grpc.max_reconnect_backoff_ms", int(1000 * _LONGEST_PAUSE)),
            *KEEPALIVE,
        )
        return grpc.secure_channel(self._address, credentials, options=options)

    def exchange(self, request: bytes) -> bytes:
        """Send one message and wait for its answer, however long the others take."""
        return self._patiently(lambda: bytes(self._method("unary_unary", EXCHANGE)(request)))

    def upload(self, pieces: Callable[[], Iterable[bytes]]) -> bytes:
        """Send a stream that can be made again from its beginning."""
        return self._patiently(lambda: bytes(self._method("stream_unary", UPLOAD)(iter(pieces()))))

    def try_exchange(self, request: bytes) -> bytes | None:
        """Send one message whose loss does no harm: one short try, None if nothing came back; a refusal counts."""
        try:
            return bytes(self._method("unary_unary", EXCHANGE)(request, timeout=_SHORT_SECONDS))
        except grpc.RpcError as error:
            if refused := _refusal(error):
                raise refused from error
            return None

    def download(self, request: Callable[[int], bytes], most: int) -> list[bytes]:
        """A header and the pieces behind it, at most `most` in all, SecurityError for a stream that goes on.

        After a break `request` is asked for a message that says how many pieces behind the header are here; an answer
        with another header is another answer, and is taken from its beginning.
        """
        pieces: list[bytes] = []
        self._patiently(lambda: self._go_on(request, pieces, most))
        return pieces

    def _go_on(self, request: Callable[[int], bytes], pieces: list[bytes], most: int) -> None:
        call = self._method("unary_stream", DOWNLOAD)(request(max(len(pieces) - 1, 0)))
        header = next(call, b"")
        if pieces and header != pieces[0]:
            call.cancel()
            pieces.clear()
            self._go_on(request, pieces, most)
            return
        pieces[:1] = [header]
        for piece in call:
            if len(pieces) == most:
                call.cancel()
                raise SecurityError(f"answer goes on after {most} pieces", culprits=[COORDINATOR])
            pieces.append(piece)

    def close(self) -> None:
        """Cancel what is open."""
        for _, channel in (*self._retired, *([self._open] if self._open else [])):
            channel.close()
        self._retired, self._open = [], None

    def _diagnose(self, error: grpc.RpcError) -> str:
        """Why there is no connection; SecurityError where it is no use to wait.

        gRPC only says that a connection is gone. To one who waits without end, since the coordinator has answered, a
        stranger in its place is one more break of the network; and if it does not know us, its clock may be wrong.
        """
        coordinator = self._roster.coordinator
        try:
            probe(self._address, coordinator, utc_now())
        except SecurityError as found:
            what = f"who answers at {self._address} is not the coordinator: {found.message}"
            hint = "is the address in the site file right? if so, who else can answer there?"
        except EnvironmentUnfitError:
            self._strange = 0
            return _why(error)
        else:
            if not hangs_up(self._address, coordinator, self._tls.current()):
                self._strange = 0
                return _why(error)
            what = f"the coordinator at {self._address} hangs up on this site's certificate"
            hint = "is this site in its roster (enroll show, at both ends), and are both clocks right?"
        self._strange += 1
        if self._strange == _SURE and self.patience < math.inf:
            raise SecurityError(what, hint=hint)
        return what

    def _patiently(self, call: Callable[[], T]) -> T:
        since, told = -math.inf, False
        pause = _FIRST_PAUSE
        while True:
            started = time.monotonic()
            try:
                return call()
            except grpc.RpcError as error:
                if refused := _refusal(error):
                    raise refused from error
                now = time.monotonic()
                if pause == _FIRST_PAUSE or now - started > _LASTED_SECONDS:  # a new break, not the old one going on
                    since, pause, told = now, _FIRST_PAUSE, False
                tells = pause == _LONGEST_PAUSE and not told
                # A look costs the other end handshakes: only where something follows from it.
                reason = self._diagnose(error) if tells or self.patience < math.inf else _why(error)
                if tells:
                    self._no_connection(reason)
                    told = True
                if now > since + self.patience:
                    raise NoConnectionError(
                        f"no connection to the coordinator at {self._address} for {self.patience:.0f} s: {reason}",
                        hint="is it running, and is the address in the site file right?",
                    ) from error
                time.sleep(pause * _DICE.uniform(0.5, 1.5))  # not all sites at the same moment
                pause = min(2 * pause, _LONGEST_PAUSE)


def _why(error: grpc.RpcError) -> str:
    failure: Any = error
    return str(failure.details())[:_MOST_REASON]


def _refusal(error: grpc.RpcError) -> MpctfError | None:
    failure: Any = error
    return from_status(failure.code(), failure.details() or "")
