"""An organisation's own log, in its keys folder: one after the other, each naming what the one before ended with.

    audit/ID/        a log as storage.py has it, and the key that it is signed with
    audit/current    the ID of the one that is written

Another one is begun where the organisation has another log key; the old ones stay as they are.
"""

import datetime
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mpctf_secure import files
from mpctf_secure.auditlog.entry import Entry
from mpctf_secure.auditlog.events import Leaf
from mpctf_secure.auditlog.history import History
from mpctf_secure.auditlog.note import Key
from mpctf_secure.auditlog.own_events import Cosigned, LogBegun
from mpctf_secure.auditlog.storage import FOLDER, Log, read_signed
from mpctf_secure.errors import DecodeError, EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.signature import SigningKey

KEY = "key"
"""In the folder of each: the key that it is signed with."""
_CURRENT, _LOCK = "current", "lock"
_ID_BYTES = 8


class OwnLog:
    """The one that is written now."""

    def __init__(self, keys: Path, name: str, identity: bytes, public: bytes, now: Callable[[], datetime.datetime]):
        """Open, or begin; SecurityError for one that was changed. `public` is the log key in force."""
        self._keys, self._now = keys, now
        with files.writing(keys):
            (keys / FOLDER).mkdir(mode=0o700, exist_ok=True)
            lock = os.open(keys / FOLDER / _LOCK, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two processes must not begin two logs
            current = _current_key(keys)
            if current and current.public == public:
                self._log = self._open(current)
            else:
                self._log = self._begin(Key(f"{name}/own/{os.urandom(_ID_BYTES).hex()}", public), identity, current)
        finally:
            os.close(lock)

    def _begin(self, key: Key, identity: bytes, current: Key | None) -> Log[History]:
        before = self._open(current).history.tree if current else None
        log = self._open(key)
        log.append(
            LogBegun(
                organisation=key.name.partition("/")[0],
                identity=identity.hex(),
                previous=current.name if current else None,
                size=len(before) if before else 0,
                root=before.root().hex() if before else None,
            )
        )
        files.replace(folder_of(self._keys, key) / KEY, key.vkey.encode())
        files.replace(self._keys / FOLDER / _CURRENT, _id(key).encode())
        return log

    @property
    def history(self) -> History:
        """What it says."""
        return self._log.history

    def append(self, event: Leaf) -> Entry:
        """On disk when this returns."""
        return self._log.append(event)

    def sign(self, key: SigningKey) -> None:
        """A checkpoint of all that is there."""
        self._log.sign(key)

    def cosigned(self, run: str, step: int) -> Cosigned | None:
        """The last checkpoint of a run's log that this organisation has cosigned, up to a step."""
        for number in range(step, -1, -1):
            if event := self.history.event(Cosigned, run, number):
                return event
        return None

    def _open(self, key: Key) -> Log[History]:
        return Log(folder_of(self._keys, key), key, History(), self._now)


def _current_key(keys: Path) -> Key | None:
    """Origin and key of the log that is written in a keys folder; None where there is none yet."""
    path = keys / FOLDER / _CURRENT
    return _key_of(keys, path.read_bytes().decode(errors="replace")) if path.exists() else None


class OwnRecord(NamedTuple):
    """One of an organisation's own logs: what it says, and how many of its leaves are signed."""

    key: Key
    history: History
    signed: int


def verified(keys: Path) -> list[OwnRecord]:
    """The own logs in a keys folder, the one that is written last; those that were pruned are not there.

    SecurityError for one that is not what was signed, and where one does not go on from another.
    """
    records, key, following = list[OwnRecord](), _current_key(keys), None
    while key:
        record = read_one(folder_of(keys, key))
        history = record.history
        if following and (
            len(history.tree) < following.size or history.tree.root(following.size).hex() != following.root
        ):
            raise SecurityError(f"{key.name}: it is not the log from which the next one goes on")
        records.append(record)
        following = history.event(LogBegun)
        before = following.previous if following else None
        if before is None or any(record.history.find("pruned", before) for record in records):
            break
        key = _key_of(keys, before.rpartition("/")[2])
    return records[::-1]


def read_one(folder: Path) -> OwnRecord:
    """One log in its folder; SecurityError where it is not what was signed."""
    key = _key_in(folder)
    return OwnRecord(key, *read_signed(folder, key, History()))


def folder_of(keys: Path, key: Key) -> Path:
    """Where the own log with this origin lies."""
    return keys / FOLDER / _id(key)


def _id(key: Key) -> str:
    return key.name.rpartition("/")[2]


def _key_of(keys: Path, log: str) -> Key:
    return _key_in(keys / FOLDER / log)


def _key_in(folder: Path) -> Key:
    path = folder / KEY
    try:
        return Key.from_vkey(path.read_text())
    except (OSError, ValueError, DecodeError) as error:
        raise EnvironmentUnfitError(f"{path}: no key of a log", hint="restore the keys folder as it was") from error
