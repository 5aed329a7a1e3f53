"""How long a gate waits for those who are missing: asked again and again, these say who is waited for no longer."""

from collections.abc import Callable
from typing import Protocol

from mpctf_secure.ids import IdentityKey

SLOW = "took more than twice as long as enough others"


class Waiting(Protocol):
    """What is asked of a gate."""

    @property
    def age(self) -> float:
        """Seconds since it was opened."""

    @property
    def arrived(self) -> list[IdentityKey]:
        """Who is in."""

    awaited: set[IdentityKey]

    def drop(self, member: IdentityKey, reason: str) -> None:
        """Wait for this one no longer."""


class ForQuorum:
    """Training, and the next state: a quorum is waited for as long as one is there, the others not for ever.

    Who is absent is not waited for then, nor who takes more than twice as long as the quorum, and a stage's time.
    """

    def __init__(
        self,
        quorum: int,
        stage: float,
        absence: float,
        present: Callable[[IdentityKey], bool],
        waits: Callable[[set[IdentityKey]], None] = lambda _: None,
    ) -> None:
        """`waits` hears once of every time that there is no quorum, and who is absent."""
        self._quorum, self._stage, self._absence, self._present = quorum, stage, absence, present
        self._waits, self._is_waiting = waits, False
        self._quorum_at: float | None = None
        self._seen_at = 0.0

    def is_over(self, gate: Waiting) -> bool:
        """Whether nobody is waited for any longer; those who are not are dropped."""
        now, missing = gate.age, set(gate.awaited)
        there = set(filter(self._present, missing))
        if len(gate.arrived) < self._quorum:
            return self._is_hopeless(now, gate, missing - there, len(gate.arrived) + len(there))
        self._quorum_at = now if self._quorum_at is None else self._quorum_at
        if there and now <= 2 * self._quorum_at + self._stage:
            return False
        for member in missing:
            gate.drop(member, SLOW if member in there else "absent")
        return True

    def _is_hopeless(self, now: float, gate: Waiting, absent: set[IdentityKey], others: int) -> bool:
        if others >= self._quorum:
            self._seen_at, self._is_waiting = now, False
        elif not self._is_waiting:
            self._is_waiting = True
            self._waits(absent)
        if now - self._seen_at <= self._absence:
            return False
        for member in absent:
            gate.drop(member, f"absent for {self._absence:g} s")
        return True


class ForUploads:
    """Masked inputs: as long as bytes come; once enough are in, as long again and a stage's time."""

    def __init__(self, enough: int, stage: float, still: Callable[[], float]) -> None:
        """`still`: seconds since a chunk came."""
        self._enough, self._stage, self._still = enough, stage, still
        self._enough_at: float | None = None

    def is_over(self, gate: Waiting) -> bool:
        """Whether nobody is waited for any longer; those who are not are dropped."""
        now = gate.age
        if self._enough_at is None and len(gate.arrived) >= self._enough:
            self._enough_at = now
        late = self._enough_at is not None and now > 2 * self._enough_at + self._stage
        if not late and min(now, self._still()) <= self._stage:
            return False
        for member in set(gate.awaited):
            gate.drop(member, SLOW if late else f"nothing came for {self._stage:g} s")
        return True
