"""One stream of events: a line of JSON each, on disk before anybody is told."""

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mpctf_secure import files

KINDS = frozenset(
    {
        "run_started",
        "participant_joined",
        "contract_closed",
        "roster_changed",
        "round_started",
        "progress",
        "stage_closed",
        "dropout",
        "refused",
        "veto",
        "box_refused",
        "sum_opened",
        "attempt_failed",
        "round_void",
        "round_finished",
        "run_interrupted",
        "run_ended",
    }
)


class Event(NamedTuple):
    """One of `KINDS`, and its fields."""

    kind: str
    fields: dict[str, Any]


Listener = Callable[[Event], None]
Record = Callable[..., None]


class EventLog:
    """Appends to events.jsonl and tells the listeners; `now` gives the wall clock in UTC."""

    def __init__(self, path: Path, now: Callable[[], datetime.datetime]) -> None:
        self._stream = path.open("a", encoding="utf-8")
        self._now = now
        self.listeners: list[Listener] = []

    def record(self, kind: str, **fields: Any) -> None:
        """Write one event; it is on disk when this returns, except for progress, which may be lost."""
        if kind not in KINDS:
            raise ValueError(f"unknown kind of event: {kind}")
        line = {"time": self._now().isoformat(timespec="milliseconds"), "event": kind, **fields}
        with files.writing(Path(self._stream.name)):
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
            if kind != "progress":
                os.fsync(self._stream.fileno())
        for listener in self.listeners:
            listener(Event(kind, fields))

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
