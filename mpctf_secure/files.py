"""Files that are there as a whole or not at all, also after a power cut."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from mpctf_secure.errors import EnvironmentUnfitError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside, such as of a full disk, becomes an EnvironmentUnfitError that names `path`."""
    try:
        yield
    except OSError as error:
        raise EnvironmentUnfitError(
            f"{path}: {error.strerror}", hint="is its folder writable, and has the disk room?"
        ) from error


def create(path: Path, content: bytes) -> None:
    """A new file of mode 0600, on disk when this returns; FileExistsError rather than replace one."""
    unfinished = _write_beside(path, content)
    try:
        os.link(unfinished, path)
    finally:
        unfinished.unlink()
    sync(path.parent)


def replace(path: Path, content: bytes) -> None:
    """Put `content`, mode 0600, in the place of what was there, on disk when this returns."""
    _write_beside(path, content).rename(path)
    sync(path.parent)


def _write_beside(path: Path, content: bytes) -> Path:
    unfinished = path.with_name(path.name + ".part")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        unfinished.unlink()
        raise
    return unfinished


def digest(path: Path) -> bytes:
    """SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def make_folder(path: Path) -> None:
    """A folder of mode 0700 whose name is on disk when this returns; one that is there already stays."""
    path.mkdir(mode=0o700, exist_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's content last, or the names that were added to or removed from a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
