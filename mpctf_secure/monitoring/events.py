"""One stream of events: a line of JSON each, on disk before anybody is told."""

import datetime
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mpctf_secure import files

COORDINATOR_KINDS = frozenset(
    {
        "run_started",
        "participant_joined",
        "run_opened",
        "process_started",
        "contract_closed",
        "contract_accepted",
        "attempt_opened",
        "sum_published",
        "round_closed",
        "step_witnessed",
        "model_exported",
        "roster_changed",
        "round_started",
        "progress",
        "resources",
        "stage_closed",
        "waiting",
        "training_failed",
        "dropout",
        "refused",
        "veto",
        "banned",
        "box_refused",
        "sum_opened",
        "sizes_added_up",
        "attempt_failed",
        "round_void",
        "round_finished",
        "run_interrupted",
        "run_ended",
    }
)
SITE_KINDS = frozenset(
    {
        "no_connection",
        "run_joined",
        "run_refused",
        "run_left",
        "job_started",
        "job_failed",
        "contract_accepted",
        "resources",
        "round_trained",
        "round_sat_out",
        "attempt_refused",
        "attempt_missed",
        "box_refused",
        "shares_released",
        "dealer_convicted",
        "round_void",
        "round_finished",
        "caught_up",
        "run_done",
    }
)


class Event(NamedTuple):
    """What happened, and its fields."""

    kind: str
    fields: dict[str, Any]


_LOSABLE = {"progress", "resources"}
Listener = Callable[[Event], None]
Record = Callable[..., None]


def _finite(value: Any) -> Any:
    """With null for what is no number, as a loss may be: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class EventLog:
    """Appends to events.jsonl and tells the listeners; `now` gives the wall clock in UTC."""

    def __init__(self, path: Path, kinds: frozenset[str], now: Callable[[], datetime.datetime]) -> None:
        """Open, or go on; what a power cut left of a last line goes."""
        self._path = path
        self._kinds = kinds
        self._stream = path.open("ab", buffering=0)
        self._stream.truncate(path.read_bytes().rfind(b"\n") + 1)
        self._now = now
        self.listeners: list[Listener] = []

    def record(self, kind: str, **fields: Any) -> None:
        """Write one event; it is on disk when this returns, except for what comes often, which may be lost."""
        if kind not in self._kinds:
            raise ValueError(f"unknown kind of event: {kind}")
        line = {"time": self._now().isoformat(timespec="milliseconds"), "event": kind, **fields}
        with files.writing(self._path):
            self._append(json.dumps(_finite(line), allow_nan=False).encode() + b"\n")
            if kind not in _LOSABLE:
                os.fsync(self._stream.fileno())
        for listener in self.listeners:
            listener(Event(kind, fields))

    def _append(self, line: bytes) -> None:
        """The whole line or nothing."""
        size = os.fstat(self._stream.fileno()).st_size
        if self._stream.write(line) != len(line):
            self._stream.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
