"""A participant's channel to the coordinator: dials out, retries while the network blinks, never changes a message."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import grpc

from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.identity import certificate
from mpctf_secure.identity.keystore import Keys
from mpctf_secure.identity.roster import Roster
from mpctf_secure.transport.service import DOWNLOAD, EXCHANGE, KEEPALIVE, UPLOAD, from_status

T = TypeVar("T")
PATIENCE_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
_SHORT_SECONDS = 5.0


class Channel:
    """One connection; every call may be repeated, since the coordinator answers equal messages equally."""

    def __init__(self, address: str, roster: Roster, keys: Keys, patience: float = PATIENCE_SECONDS) -> None:
        # The only trust anchor is the coordinator's own certificate, so no other member can pose as it.
        credentials = grpc.ssl_channel_credentials(
            root_certificates=certificate.to_pem(roster.coordinator.certificate),
            private_key=keys.tls_key_pem,
            certificate_chain=certificate.to_pem(keys.tls_certificate),
        )
        options = (("grpc.ssl_target_name_override", roster.coordinator.name), *KEEPALIVE)
        self._channel = grpc.secure_channel(address, credentials, options=options)
        self._exchange: Callable[..., bytes] = self._channel.unary_unary(EXCHANGE)
        self._upload: Callable[[Iterator[bytes]], bytes] = self._channel.stream_unary(UPLOAD)
        self._download: Callable[[bytes], Any] = self._channel.unary_stream(DOWNLOAD)
        self._address = address
        self._patience = patience

    def exchange(self, request: bytes) -> bytes:
        """Send one message and wait for its answer, however long the others take."""
        return self._patiently(lambda: self._exchange(request))

    def upload(self, pieces: Callable[[], Iterable[bytes]]) -> bytes:
        """Send a stream that can be made again from its beginning."""
        return self._patiently(lambda: self._upload(iter(pieces())))

    def try_exchange(self, request: bytes) -> bytes | None:
        """Send one message whose loss does no harm: one short try, None if nothing came back."""
        try:
            return self._exchange(request, timeout=_SHORT_SECONDS)
        except grpc.RpcError:
            return None

    def download(self, request: bytes, most: int) -> list[bytes]:
        """The pieces of the answer, at most `most`, SecurityError for a stream that goes on.

        A break in the middle starts the whole call again.
        """
        return self._patiently(lambda: self._pieces(request, most))

    def _pieces(self, request: bytes, most: int) -> list[bytes]:
        call = self._download(request)
        pieces = list(itertools.islice(call, most + 1))
        if len(pieces) > most:
            call.cancel()
            raise SecurityError(f"answer goes on after {most} pieces", culprits=["coordinator"])
        return pieces

    def close(self) -> None:
        """Cancel what is open."""
        self._channel.close()

    def _patiently(self, call: Callable[[], T]) -> T:
        give_up: float | None = None
        pause = _FIRST_PAUSE
        while True:
            started = time.monotonic()
            try:
                return call()
            except grpc.RpcError as error:
                failure: Any = error
                refused = from_status(failure.code(), failure.details() or "")
                if refused:
                    raise refused from error
                now = time.monotonic()
                if give_up is None or now - started > self._patience:  # a new break, not the old one going on
                    give_up, pause = now + self._patience, _FIRST_PAUSE
                if now > give_up:
                    raise EnvironmentUnfitError(
                        f"no connection to the coordinator at {self._address} for {self._patience:.0f} s",
                        hint="is it running, and is the address in the site file right?",
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
