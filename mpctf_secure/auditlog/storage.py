"""Logs on disk, the one file of this room that touches it: AUDIT.md section 2.

log.jsonl     a leaf a line
checkpoint    the newest that its writer has signed
lock          held during every operation

and in a run's log and its copies also

witnessed     the newest checkpoint with cosignatures
steps/R       the checkpoint that step R's witnesses are asked for: it is signed once
certificates/R, contract.json, rosters/N.json
"""

import contextlib
import datetime
import errno
import fcntl
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from mpctf_secure import files
from mpctf_secure.auditlog.entry import Entry, to_text
from mpctf_secure.auditlog.events import ClockSet, Leaf, LogRecovered
from mpctf_secure.auditlog.history import History
from mpctf_secure.auditlog.note import Checkpoint, Key, Note
from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.signature import SigningKey

FOLDER = "audit"
"""Of logs, in the folder of a run and in that of keys."""
LOG, CHECKPOINT, WITNESSED, CONTRACT = "log.jsonl", "checkpoint", "witnessed", "contract.json"
STEPS, CERTIFICATES, ROSTERS = "steps", "certificates", "rosters"
_LOCK = "lock"
_PIECE_BYTES = 1 << 20
_RESTORE = "restore the folder as it was: a log is never begun again"
H = TypeVar("H", bound=History)


class _Folder(Generic[H]):
    """The file of leaves, and how far it is read."""

    def __init__(self, folder: Path, history: H) -> None:
        self.history = history
        self._folder = folder
        self._ends = array("Q", [0])  # of each leaf in the file, behind that of nothing
        with files.writing(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def leaves(self, start: int, end: int) -> list[bytes]:
        """Some of the leaves that were read, as they are in the file."""
        with self._locked() as descriptor:
            first = self._ends[start]
            return os.pread(descriptor, self._ends[end] - first, first).split(b"\n")[:-1]

    def _read(self, descriptor: int) -> bytes:
        """Take what is new in the file; what is at its end and no leaf.

        SecurityError where it got shorter, or has more behind a line that is none.
        """
        size = os.fstat(descriptor).st_size
        if size < self._ends[-1]:
            raise self._damaged(f"{LOG} has become shorter")
        lines = _lines(descriptor, self._ends[-1], size)
        for line in lines:
            try:
                if not line.endswith(b"\n"):
                    return line
                self.history.take(line[:-1])
            except SecurityError as error:
                if next(lines, None) is not None:
                    raise self._damaged(f"leaf {len(self._ends) - 1}: {error.message}") from error
                return line
            self._ends.append(self._ends[-1] + len(line))
        return b""

    def _damaged(self, why: str) -> SecurityError:
        return SecurityError(f"{self._folder}: {why}", hint=_RESTORE)

    def _write(self, descriptor: int, lines: Sequence[bytes]) -> None:
        """All of them or nothing, synced; the caller takes them into the history."""
        content = b"".join(line + b"\n" for line in lines)
        with files.writing(self._folder / LOG):
            try:
                if os.pwrite(descriptor, content, self._ends[-1]) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, self._ends[-1])
                raise
        for line in lines:
            self._ends.append(self._ends[-1] + len(line) + 1)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """A descriptor of the leaves' file, with the lock held."""
        with contextlib.ExitStack() as stack:
            with files.writing(self._folder):
                lock, descriptor = (
                    os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600) for name in (_LOCK, LOG)
                )
                stack.callback(os.close, lock)
                stack.callback(os.close, descriptor)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield descriptor


class Log(_Folder[H]):
    """A log to which this process writes, and maybe others; `now` gives the time in UTC."""

    def __init__(self, folder: Path, key: Key, history: H, now: Callable[[], datetime.datetime]) -> None:
        """Open, or begin; `key` has the origin as its name. SecurityError for a log that is not what was signed."""
        super().__init__(folder, history)
        self._key, self._now = key, now
        with self._locked() as descriptor:
            os.fsync(descriptor)
            self._refresh(descriptor)
            self._check_signed()

    def append(self, event: Leaf) -> Entry:
        """On disk when this returns. An event with a key is appended once: AUDIT.md 2.5."""
        with self._locked() as descriptor:
            self._refresh(descriptor)
            known = self.history.known.get(event.key) if event.key else None
            if known is None:
                return self._append(descriptor, event)
            if known.event != event:
                raise EnvironmentUnfitError(
                    f"{self._folder}: this was told otherwise before: {known.event!r}, now {event!r}",
                    hint="is it the same program, and are run and keys folders of the same age?",
                )
            return known

    def sign(self, key: SigningKey, *extra: str) -> Note:
        """A signed checkpoint of all leaves, on disk when this returns; of one with the same extra line, the same."""
        if key.public != self._key.public:  # a rotated one; with such a signature nobody could open the log again
            raise EnvironmentUnfitError(f"{self._folder}: is signed with another key", hint="enroll show; " + _RESTORE)
        with self._locked() as descriptor:
            self._refresh(descriptor)
            newest = self._newest()
            if newest and extra and Checkpoint.decode(newest.text).extra == extra:
                return newest
            tree = self.history.tree
            note = Note(Checkpoint(self._key.name, len(tree), tree.root(), extra).encode())
            note = note.signed(self._key.name, key)
            with files.writing(self._folder / CHECKPOINT):
                files.replace(self._folder / CHECKPOINT, note.encode())
            return note

    def _refresh(self, descriptor: int) -> None:
        """What others have added; and away with what somebody who was killed has left.

        That is a line without its end, or with bytes that a power cut kept from the disk; any other was written so.
        """
        if rest := self._read(descriptor):
            self._check_signed()
            if rest.endswith(b"\n") and b"\0" not in rest:
                raise self._damaged(f"leaf {len(self._ends) - 1} is none that can come next")
            os.ftruncate(descriptor, self._ends[-1])
            if len(self.history.tree):
                self._append(descriptor, LogRecovered(dropped=len(rest)))

    def _newest(self) -> Note | None:
        path = self._folder / CHECKPOINT
        return Note.decode(path.read_bytes()) if path.exists() else None

    def _check_signed(self) -> None:
        try:
            if newest := self._newest():
                check_below(self.history, newest.checkpoint(self._key))
        except SecurityError as error:
            raise self._damaged(error.message) from error

    def _append(self, descriptor: int, event: Leaf) -> Entry:
        now, last = self._now(), self.history.last
        now = now.replace(microsecond=now.microsecond // 1000 * 1000)
        if last and now < last:
            self._put(descriptor, Entry(ClockSet(before=to_text(last)), now))
        return self._put(descriptor, Entry(event, now))

    def _put(self, descriptor: int, entry: Entry) -> Entry:
        self.history.check(entry)
        line = entry.encode()
        self._write(descriptor, [line])
        return self.history.take(line)


class Copy(_Folder[H]):
    """A witness's copy of another's log: a cache of what was checked, which may be lost."""

    def __init__(self, folder: Path, begin: Callable[[], H]) -> None:
        """Open, or begin; what is not whole is dropped, and got again."""
        super().__init__(folder, begin())
        self._begin = begin
        with self._locked() as descriptor:
            try:
                self._read(descriptor)
            except SecurityError:
                self.forget()

    def extend(self, history: H, lines: Sequence[bytes]) -> None:
        """Keep leaves, with which the log is `history`. On disk when this returns."""
        with self._locked() as descriptor:
            os.ftruncate(descriptor, self._ends[-1])
            self._write(descriptor, lines)
            self.history = history

    def forget(self) -> None:
        """Begin again: what is here is not what its writer, or this witness, knows."""
        self.history, self._ends = self._begin(), array("Q", [0])


def _lines(descriptor: int, at: int, size: int) -> Iterator[bytes]:
    """Each with its end, the last one maybe without."""
    rest = b""
    while at < size and (piece := os.pread(descriptor, min(_PIECE_BYTES, size - at), at)):
        at += len(piece)
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line + b"\n" for line in whole)
    if rest:
        yield rest


class Record(NamedTuple):
    """What lies in the folder of a run's log, or of a copy of it; nothing of it is verified."""

    lines: list[bytes]
    rest: bytes
    """Behind the last leaf: a line without its end."""
    notes: dict[str, bytes]
    """Checkpoints, by their files' names."""
    certificates: dict[int, bytes]
    contract: bytes
    rosters: list[bytes]


def read_record(folder: Path) -> Record:
    """Read all of it; EnvironmentUnfitError where there is no log."""
    if not (folder / LOG).is_file():
        raise EnvironmentUnfitError(f"{folder}: no {LOG} here", hint="the audit folder of a run, or of a site's copy")
    contract = folder / CONTRACT
    # A log that is being written has beside it what its checkpoint's leaves tell of, and behind them maybe more.
    notes = {name: (folder / name).read_bytes() for name in (CHECKPOINT, WITNESSED) if (folder / name).is_file()}
    steps, certificates, rosters = (
        {path.name.removesuffix(suffix): path.read_bytes() for path in _numbered(folder / name, suffix)}
        for name, suffix in ((STEPS, ""), (CERTIFICATES, ""), (ROSTERS, ".json"))
    )
    notes |= {f"{STEPS}/{step}": data for step, data in steps.items()}
    said = contract.read_bytes() if contract.is_file() else b""
    *lines, rest = (folder / LOG).read_bytes().split(b"\n")
    by_step = {int(step): data for step, data in certificates.items()}
    return Record(lines, rest, notes, by_step, said, list(rosters.values()))


def _numbered(folder: Path, suffix: str) -> list[Path]:
    """Its files that are called after a number; others lie there by chance."""
    named = (path for path in sorted(folder.glob(f"*{suffix}")) if path.name.removesuffix(suffix).isdecimal())
    return [path for path in named if path.is_file()]


def take_all(lines: Iterable[bytes], history: H) -> H:
    """A log's leaves from the first on; SecurityError names the one that cannot be there."""
    for number, line in enumerate(lines):
        try:
            history.take(line)
        except SecurityError as error:
            raise SecurityError(f"leaf {number}: {error.message}") from error
    return history


def check_below(history: History, checkpoint: Checkpoint) -> int:
    """How many leaves are below a checkpoint; SecurityError where they do not lead to it."""
    if checkpoint.size > len(history.tree):
        raise SecurityError(f"{len(history.tree)} leaves, and {checkpoint.size} were signed: the log was cut off")
    if history.tree.root(checkpoint.size) != checkpoint.root:
        raise SecurityError(f"the first {checkpoint.size} leaves are not those that were signed: the log was changed")
    return checkpoint.size


def signed_size(record: Record, key: Key, history: History) -> int:
    """How many leaves are below a checkpoint; SecurityError names one that is not of this log."""
    sizes = [0]
    for name, data in record.notes.items():
        try:
            sizes.append(check_below(history, Note.decode(data).checkpoint(key)))
        except SecurityError as error:
            raise SecurityError(f"{name}: {error.message}", culprits=error.culprits) from error
    return max(sizes)


def read_signed(folder: Path, key: Key, history: H) -> tuple[H, int]:
    """A log as it is on disk, and how many of its leaves are signed; SecurityError where they are others."""
    record = read_record(folder)
    try:
        take_all(record.lines, history)
        return history, signed_size(record, key, history)
    except SecurityError as error:
        raise SecurityError(f"{folder}: {error.message}", hint=_RESTORE) from error


def keep_beside(folder: Path, contract: bytes, rosters: Mapping[str, bytes]) -> None:
    """Put what a reader needs beside a log, unless it is there."""
    for name in (STEPS, CERTIFICATES, ROSTERS):
        files.make_folder(folder / name)
    with files.writing(folder):
        for name, content in ((CONTRACT, contract), *((f"{ROSTERS}/{name}", data) for name, data in rosters.items())):
            if content and not (folder / name).exists():
                files.replace(folder / name, content)


def keep_witnessed(folder: Path, note: Note) -> None:
    """Put a cosigned checkpoint there, unless a later one is."""
    path = folder / WITNESSED
    with files.writing(path):
        if path.exists():
            known = Checkpoint.decode(Note.decode(path.read_bytes()).text)
            if known.size > Checkpoint.decode(note.text).size:
                return
        files.replace(path, note.encode())
