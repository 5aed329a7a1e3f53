"""A run on disk: rows that are only appended, from which a restarted coordinator gets to where it was.

RECOVERY.md section 1 says what a row means and when it is written. Whoever calls has it on disk when the call returns.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mpctf_secure.database import Database, reading
from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.ids import IdentityKey

_FILE = "run.sqlite"
_SCHEMA = """
CREATE TABLE entry (seq INTEGER PRIMARY KEY, kind TEXT, label TEXT, ctx BLOB, round INTEGER, member BLOB, body BLOB,
    UNIQUE (kind, label, ctx, round, member));
CREATE TABLE finished (round INTEGER PRIMARY KEY, outcome BLOB, certificate BLOB, record TEXT);
CREATE TABLE ended (code INTEGER, reason TEXT);
"""
_KEY_BYTES = 32


class GateKey(NamedTuple):
    """Which gate of a run: the label and the context of its messages, and the round, 0 before the first."""

    label: str
    ctx: bytes
    round: int


class Message(NamedTuple):
    """Somebody's message was accepted."""

    gate: GateKey
    sender: IdentityKey
    body: bytes


class Closed(NamedTuple):
    """A gate was closed: why those who had been awaited are not in, and after how many seconds."""

    gate: GateKey
    left: Mapping[IdentityKey, str]
    seconds: float


class Banned(NamedTuple):
    """A member is out of the run for good."""

    member: IdentityKey
    reason: str


class Attempt(NamedTuple):
    """Who is in an attempt after the first; nobody: there is none, and the round is void."""

    round: int
    number: int
    cohort: tuple[IdentityKey, ...]


Row = Message | Closed | Banned | Attempt


class Finished(NamedTuple):
    """A round is over: how (the body of its publication or void), and the signatures of those who hold the state."""

    round: int
    outcome: bytes
    certificate: bytes
    record: dict[str, Any]


class Ended(NamedTuple):
    """The run is over."""

    code: int
    reason: str


class Journal:
    """The rows of one run; holds its lock, so that two coordinators never write them."""

    def __init__(self, folder: Path) -> None:
        """Open, or make a new one; EnvironmentUnfitError where another process has it or it cannot be read."""
        busy = EnvironmentUnfitError(f"{folder}: another process has this run", hint="runs list")
        self._db = Database(folder / _FILE, _SCHEMA, busy)

    @staticmethod
    def peek(folder: Path) -> tuple[list[Finished], Ended | None]:
        """The rounds that are over, and how the run ended, of a run that another process may have."""
        if not (folder / _FILE).exists():
            return [], None  # killed before it began
        with reading(folder / _FILE) as db:
            return _finished(db), _ended(db)

    def close(self) -> None:
        """Let go of the run."""
        self._db.close()

    def add(self, row: Row) -> None:
        """Append; sqlite3.IntegrityError for a gate's second closing and, in a round, a sender's second message."""
        match row:
            case Message(gate, sender, body):
                # Before the first round a site may still mend what it is.
                self._insert("message", gate, sender, body, replaces=gate.round == 0)
            case Closed(gate, left, seconds):
                reasons = {member.hex(): reason for member, reason in left.items()}
                self._insert("closed", gate, b"", json.dumps([reasons, seconds]).encode())
            case Banned(member, reason):
                self._insert("banned", GateKey("", b"", 0), member, reason.encode())
            case Attempt(number, attempt, cohort):
                self._insert("attempt", GateKey(str(attempt), b"", number), b"", b"".join(cohort))

    def rows(self) -> Iterator[Row]:
        """All rows of rounds that are not over, in their order."""
        entries = self._db.execute("SELECT kind, label, ctx, round, member, body FROM entry ORDER BY seq")
        for kind, label, ctx, number, member, body in entries:
            gate = GateKey(label, ctx, number)
            match kind:
                case "message":
                    yield Message(gate, IdentityKey(member), body)
                case "closed":
                    reasons, seconds = json.loads(body)
                    yield Closed(gate, {IdentityKey(bytes.fromhex(m)): why for m, why in reasons.items()}, seconds)
                case "banned":
                    yield Banned(IdentityKey(member), body.decode())
                case "attempt":
                    cohort = (IdentityKey(body[at : at + _KEY_BYTES]) for at in range(0, len(body), _KEY_BYTES))
                    yield Attempt(number, int(label), tuple(cohort))

    def finish(self, row: Finished) -> None:
        """A round is over: its rows go, but not those of the run itself, round 0."""
        with self._db.transaction():
            content = (*row[:3], json.dumps(row.record))
            self._db.execute("INSERT INTO finished VALUES (?, ?, ?, ?)", content)
            self._db.execute("DELETE FROM entry WHERE round BETWEEN 1 AND ?", (row.round,))

    def finished(self) -> list[Finished]:
        """All rounds that are over."""
        return _finished(self._db)

    def end(self, row: Ended) -> None:
        """The run is over."""
        self._db.execute("INSERT INTO ended VALUES (?, ?)", row)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has happened yet."""
        return self._db.execute("SELECT 1 FROM entry UNION SELECT 1 FROM finished").fetchone() is None

    @property
    def ended(self) -> Ended | None:
        """How the run ended, None while it has not."""
        return _ended(self._db)

    def _insert(self, kind: str, gate: GateKey, member: bytes, body: bytes, *, replaces: bool = False) -> None:
        verb = "REPLACE" if replaces else "INSERT"
        self._db.execute(f"{verb} INTO entry VALUES (NULL, ?, ?, ?, ?, ?, ?)", (kind, *gate, member, body))


def _finished(db: Database | sqlite3.Connection) -> list[Finished]:
    rows = db.execute("SELECT * FROM finished ORDER BY round")
    return [Finished(number, outcome, signed, json.loads(record)) for number, outcome, signed, record in rows]


def _ended(db: Database | sqlite3.Connection) -> Ended | None:
    row = db.execute("SELECT code, reason FROM ended").fetchone()
    return Ended(*row) if row else None
