"""What strangers left: valid files of a ceremony, few, small, and not for long."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mpctf_secure import files
from mpctf_secure.errors import EnvironmentUnfitError, UsageError
from mpctf_secure.identity import enrollment
from mpctf_secure.identity.documents import Document, Request, RosterBody, SignedRoster, Vote, decode_any
from mpctf_secure.transport.mailbox import MOST_FILES

KEPT_SECONDS = 14 * 24 * 3600.0
_MOST_BYTES = 64 << 20
_MOST_OF_ONE = 32  # so that one stranger does not fill it


class Folder:
    """A mailbox on disk; a file's name is its hash, so nobody chooses one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._left: Counter[str] = Counter()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, data: bytes, sender: str) -> None:
        """Keep a file of the ceremony; the same again changes nothing. A sender is a network address."""
        document = decode_any(data)
        if isinstance(document, Request):
            enrollment.verify_request(document)
        path = self._path / f"{document.hash.hex()}.json"
        kept = self._forget_old()
        if path in kept:
            return
        if self._left[sender] >= _MOST_OF_ONE:
            raise EnvironmentUnfitError(
                f"{_MOST_OF_ONE} files came from your address already", hint="send the file by e-mail"
            )
        if len(kept) >= MOST_FILES or sum(one.stat().st_size for one in kept) + len(data) > _MOST_BYTES:
            raise EnvironmentUnfitError("the mailbox is full", hint="send the file by e-mail, and tell the coordinator")
        with files.writing(path):
            files.create(path, document.encode())
        self._left[sender] += 1

    def files(self) -> Iterator[bytes]:
        """All that is not too old."""
        return (path.read_bytes() for path in self._forget_old())

    def _forget_old(self) -> list[Path]:
        kept = sorted(self._path.glob("*.json"))
        for path in kept:
            if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                path.unlink(missing_ok=True)
        return [path for path in kept if path.exists()]


def file_name(document: Document) -> str:
    """Under which name a fetched file is kept: by its content alone, so that nobody takes another's place."""
    mark = document.hash.hex()[:8]
    match document:
        case Request(name=name):
            return f"{name}.{mark}.request.json"
        case Vote(roster=roster):
            return f"roster.{roster[:8]}.{mark}.signature.json"
        case SignedRoster(roster=body):
            return f"roster-{body.version}.{mark}.signed.json"
        case RosterBody(version=version):
            return f"roster-{version}.{mark}.json"
    raise UsageError("a file of an unknown kind", hint="is this program as new as the other's?")
