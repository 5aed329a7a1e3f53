"""A SQLite file that one process has at a time, and that is on disk at every commit."""

import contextlib
import fcntl
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from mpctf_secure.errors import EnvironmentUnfitError

_LOCK = "lock"


class Database:
    """An open database and the lock of its folder; errors but sqlite3.IntegrityError name the file."""

    def __init__(self, path: Path, schema: str, busy: EnvironmentUnfitError) -> None:
        """Open, or make a new one (mode 0600, `schema` in one transaction); raises `busy` where another process has it.

        EnvironmentUnfitError for a file that cannot be read.
        """
        self._path = path
        self._lock = (path.parent / _LOCK).open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise busy from error
        with _naming(path):
            self._connection = sqlite3.connect(path, isolation_level=None)
            path.chmod(0o600)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            if self._connection.execute("PRAGMA user_version").fetchone() == (0,):
                self._connection.executescript(f"BEGIN; {schema} PRAGMA user_version = 1; COMMIT;")

    def close(self) -> None:
        """Let go of it."""
        self._connection.close()
        self._lock.close()

    def execute(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """One statement; what it changes is on disk when this returns, outside of a transaction."""
        with _naming(self._path):
            return self._connection.execute(statement, values)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements of the block or none."""
        self.execute("BEGIN")
        try:
            yield
        except BaseException:
            self.execute("ROLLBACK")
            raise
        self.execute("COMMIT")


def is_in_use(folder: Path) -> bool:
    """Whether a process has the database in this folder."""
    if not (folder / _LOCK).exists():
        return False
    with (folder / _LOCK).open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Read only, whoever else has it."""
    with (
        _naming(path),
        contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection,
    ):
        yield connection


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.Error as error:
        raise EnvironmentUnfitError(f"{path}: {error}", hint="has the disk room, and is it whole?") from error
