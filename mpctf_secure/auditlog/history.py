"""In which order the leaves of a run's log can come: what an auditor, a site, and the writer itself check.

run_opened, contract_closed, then for R = 1, 2 …:
    step_witnessed R-1, attempt_opened (R, 1), [attempt_failed, attempt_opened (R, 2) …],
    sum_published or attempt_failed and round_void, round_closed R
and at last run_ended, maybe before its time. Everything else may come anywhere between the first and the last.
"""

import copy
import datetime
from typing import Self, TypeVar

from mpctf_secure.auditlog.entry import Entry, Kinds, to_text
from mpctf_secure.auditlog.events import (
    AttemptFailed,
    AttemptOpened,
    ClockSet,
    ContractClosed,
    Key,
    Leaf,
    OfRun,
    RoundClosed,
    RoundVoid,
    RunEnded,
    RunOpened,
    StepWitnessed,
    SumPublished,
)
from mpctf_secure.auditlog.merkle import Tree, leaf_hash
from mpctf_secure.auditlog.own_events import OfOrganisation
from mpctf_secure.errors import SecurityError

L = TypeVar("L", bound=Leaf)


class History:
    """A log's leaves so far: their tree, and of those that are there once the events. Takes the next, or refuses it."""

    kinds: Kinds = OfOrganisation

    def __init__(self) -> None:
        self.tree = Tree()
        self.known = dict[Key, Entry]()
        """By the keys of their events."""
        self.places = dict[Key, int]()
        """The same ones' numbers in the log."""
        self.last: datetime.datetime | None = None
        """The time of the last leaf."""

    def copy(self) -> Self:
        """One that goes on by itself."""
        other = copy.copy(self)
        other.tree, other.known, other.places = self.tree.copy(), dict(self.known), dict(self.places)
        return other

    def take(self, line: bytes) -> Entry:
        """The next leaf; SecurityError where it cannot be that, and nothing is changed then."""
        entry = Entry.decode(line, self.kinds)
        self.check(entry)
        self.last = entry.time
        if entry.event.key:
            self.known[entry.event.key] = entry
            self.places[entry.event.key] = len(self.tree)
        self.tree.append(leaf_hash(line))
        self.advance(entry.event)
        return entry

    def find(self, kind: str, *which: str | int) -> Entry | None:
        """The one of this kind, with these fields where there may be more of it: see its `ONCE`."""
        return self.known.get((kind, *which))

    def event(self, kind: type[L], *which: str | int) -> L | None:
        """The event of this one, if it is there."""
        entry = self.find(str(kind.model_fields["kind"].default), *which)
        return entry.event if entry and isinstance(entry.event, kind) else None

    def check(self, entry: Entry) -> None:
        """SecurityError where this cannot come next: it is there already, or is older than the one before."""
        event = entry.event
        if event.key in self.known:
            raise SecurityError(f"{event.kind} is in the log twice")
        before = to_text(self.last) if self.last and entry.time < self.last else None
        if before != (event.before if isinstance(event, ClockSet) else None):
            raise SecurityError(f"{event.kind} of {to_text(entry.time)} after a leaf of {before}")
        self.check_order(event)

    def check_order(self, event: Leaf) -> None:
        """SecurityError where an event cannot come next."""

    def advance(self, event: Leaf) -> None:
        """It has come."""


class HistoryOfRun(History):
    """Where a run stands by its log."""

    kinds = OfRun

    def __init__(self) -> None:
        super().__init__()
        self.round = 0
        """The last one that was closed."""
        self._due: tuple[str, ...] = ("run_opened",)
        self._attempt = 0

    def stands_at(self, step: int, size: int) -> bool:
        """Whether the first `size` leaves end with a step: it is closed in them, and nothing after it has begun."""
        closed = self.places.get(("round_closed", step) if step else ("contract_closed",), len(self.tree))
        after = (("step_witnessed", step), ("model_exported",), ("run_ended",))
        return closed < size <= min((self.places[key] for key in after if key in self.places), default=size)

    def check_order(self, event: Leaf) -> None:
        """One of the protocol's events must be due, with the round and attempt that are due."""
        if self._due == ("run_opened",) and event.kind != "run_opened":
            raise SecurityError(f"log begins with {event.kind}")
        if not self._due:
            raise SecurityError(f"{event.kind} after the end of the run")
        if not isinstance(event, _PROTOCOL):
            return
        if event.kind not in self._due and not (isinstance(event, RunEnded) and self._due != ("run_opened",)):
            raise SecurityError(f"{event.kind} where {' or '.join(self._due)} is due")
        due = self.round if isinstance(event, StepWitnessed) else self.round + 1
        if getattr(event, "round", due) != due:
            raise SecurityError(f"{event.kind} of another round than {due}")
        attempt = self._attempt + isinstance(event, AttemptOpened)
        if getattr(event, "attempt", attempt) != attempt:
            raise SecurityError(f"{event.kind} of another attempt than {attempt} of round {due}")

    def advance(self, event: Leaf) -> None:
        """What is due after it."""
        if not isinstance(event, _PROTOCOL):
            return
        self._attempt += isinstance(event, AttemptOpened)
        if isinstance(event, RoundClosed):
            self.round, self._attempt = self.round + 1, 0
        self._due = _NEXT[event.kind]


_PROTOCOL = (
    RunOpened,
    ContractClosed,
    StepWitnessed,
    AttemptOpened,
    AttemptFailed,
    SumPublished,
    RoundVoid,
    RoundClosed,
    RunEnded,
)
_NEXT = {
    "run_opened": ("contract_closed",),
    "contract_closed": ("step_witnessed",),
    "step_witnessed": ("attempt_opened",),
    "attempt_opened": ("attempt_failed", "sum_published"),
    "attempt_failed": ("attempt_opened", "round_void"),
    "sum_published": ("round_closed",),
    "round_void": ("round_closed",),
    "round_closed": ("step_witnessed",),
    "run_ended": (),
}
