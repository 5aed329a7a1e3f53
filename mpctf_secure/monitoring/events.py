"""One stream of events: a line of JSON each, on disk before anybody is told."""

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Event(NamedTuple):
    """A kind from the closed list in docs/events.md, and its fields."""

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
        line = {"time": self._now().isoformat(timespec="milliseconds"), "event": kind, **fields}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        if kind != "progress":
            os.fsync(self._stream.fileno())
        for listener in self.listeners:
            listener(Event(kind, fields))

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
