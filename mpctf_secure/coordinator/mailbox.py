"""What strangers left: valid files of a ceremony, few, small, and not for long."""

import time
from pathlib import Path

from mpctf_secure import files
from mpctf_secure.errors import EnvironmentUnfitError, UsageError
from mpctf_secure.identity import enrollment
from mpctf_secure.identity.documents import Request, decode_any
from mpctf_secure.transport.mailbox import MOST_FILES

KEPT_SECONDS = 14 * 24 * 3600.0
_MOST_BYTES = 64 << 20


class Folder:
    """A mailbox on disk; a file's name is its hash, so nobody chooses one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, data: bytes) -> None:
        """Keep a file of the ceremony; the same again changes nothing."""
        document = decode_any(data)
        if isinstance(document, Request):
            enrollment.verify_request(document)
        path = self._path / f"{document.hash.hex()}.json"
        kept = self._forget_old()
        if path in kept:
            return
        if len(kept) >= MOST_FILES or sum(one.stat().st_size for one in kept) + len(data) > _MOST_BYTES:
            raise EnvironmentUnfitError("the mailbox is full", hint="send the file by e-mail, and tell the coordinator")
        with files.writing(path):
            files.create(path, document.encode())

    def files(self) -> list[bytes]:
        """All that is not too old."""
        return [path.read_bytes() for path in self._forget_old()]

    def _forget_old(self) -> list[Path]:
        kept = sorted(self._path.glob("*.json"))
        for path in kept:
            if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                path.unlink(missing_ok=True)
        return [path for path in kept if path.exists()]


def file_name(data: bytes) -> str:
    """Under which name a fetched file is kept: made from its content, never from what a sender says."""
    document = decode_any(data)
    match document.model_dump():
        case {"type": "mpctf-secure/request/v1", "name": name}:
            return f"{name}.request.json"
        case {"type": "mpctf-secure/roster-signature/v1", "roster": roster, "signer": signer}:
            return f"roster.{roster[:8]}.{signer[:8]}.signature.json"
        case {"type": "mpctf-secure/signed-roster/v1", "roster": {"version": version}}:
            return f"roster-{version}.signed.json"
        case {"type": "mpctf-secure/roster/v1", "version": version}:
            return f"roster-{version}.json"
    raise UsageError("a file of an unknown kind", hint="is this program as new as the other's?")
