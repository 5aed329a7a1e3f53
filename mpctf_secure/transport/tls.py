"""This end's TLS key: drawn in memory, renewed by itself at half its life, never on disk."""

import datetime
import threading
from collections.abc import Callable

from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import certificate
from mpctf_secure.identity.certificate import TlsKey
from mpctf_secure.identity.roster import Member

Clock = Callable[[], datetime.datetime]


def utc_now() -> datetime.datetime:
    """The wall clock."""
    return datetime.datetime.now(datetime.UTC)


class OwnTls:
    """What this member shows in handshakes; gRPC asks from threads of its own."""

    def __init__(
        self,
        identity: SigningKey,
        member: Member,
        life: datetime.timedelta = certificate.LIFE,
        clock: Clock = utc_now,
    ) -> None:
        self._identity = identity
        self._member = member
        self._life = life
        self._clock = clock
        self._lock = threading.Lock()
        self._current = self._issue()

    def current(self) -> TlsKey:
        """The key in use, a new one when it is due."""
        with self._lock:
            # Before it was issued: the clock was wrong then, and so is the certificate.
            if not self._issued_at <= self._clock() < self._current.renew_at:
                self._current = self._issue()
            return self._current

    def _issue(self) -> TlsKey:
        self._issued_at = self._clock()
        return certificate.issue(self._identity, self._member.name, self._member.role, self._issued_at, self._life)
