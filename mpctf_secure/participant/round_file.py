"""The sealed file of one round: everything that a participant must still know after a crash, and nobody else ever.

Each record is AES-256-GCM under the round's own key, which lies in the keystore and is unlinked when the round closes;
what a disk keeps of deleted files is not in our hands. A record that a crash tore was never acknowledged, so nothing
that depends on it has left, and it is cut off.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mpctf_secure import files
from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat import aead
from mpctf_secure.hazmat.encoding import enc, u32
from mpctf_secure.hazmat.kdf import hkdf
from mpctf_secure.identity import keystore

_LENGTH_BYTES = 4
_MOST_BYTES = 1 << 26


class Entry(NamedTuple):
    """One record: what it is, which is not secret, and its content, which is sealed."""

    kind: str
    content: bytes | memoryview


class LostRoundError(EnvironmentUnfitError):
    """This site joined the round and has no usable file of it: it may not take part in it any more."""


class RoundFile:
    """An open round; `entries` is what was there when it was opened."""

    def __init__(self, folder: Path, keys: Path, run_id: str, contract_hash: bytes, number: int) -> None:
        """Join the round, or go on in it after a crash; LostRoundError where it cannot go on.

        A second contract under a run id that was used before does not open what was sealed under the first.
        """
        self._path = folder / f"{number}.sealed"
        self._keys, self._key_name = keys, f"{run_id}.{number}"
        self._bound = enc("mpctf-secure/round-file/v1", run_id, contract_hash, number)
        if number > keystore.joined_round(keys, run_id):
            # In this order: nothing leaves before the last step, so what a crash left of the first two is void.
            keystore.destroy_round_key(keys, self._key_name)
            self._path.unlink(missing_ok=True)
            keystore.create_round_key(keys, self._key_name)
            files.create(self._path, b"")
            keystore.note_joined(keys, run_id, number)
        self._key = self._load_key()
        self.entries = list(self._recover())
        self._count = len(self.entries)
        self._stream: BinaryIO = self._path.open("ab")

    def append(self, *entries: Entry) -> None:
        """On disk when this returns. After an error the file is shut, so nothing more can be sent in this round."""
        with contextlib.ExitStack() as broken, files.writing(self._path):
            broken.callback(self._stream.close)
            for entry in entries:
                self._write(entry)
            self._stream.flush()
            os.fsync(self._stream.fileno())
            broken.pop_all()

    def derive(self, label: str) -> bytes:
        """32 bytes for a purpose; they go with the round's key."""
        return hkdf(self._key, enc("mpctf-secure/round-secret/v1", label))

    def close(self) -> None:
        """The round is over: unlink the key, then what it sealed."""
        self._stream.close()
        keystore.destroy_round_key(self._keys, self._key_name)
        self._path.unlink(missing_ok=True)

    def _load_key(self) -> bytes:
        try:
            return keystore.load_round_key(self._keys, self._key_name)
        except EnvironmentUnfitError as error:
            raise self._lost("its key is gone") from error

    def _write(self, entry: Entry) -> None:
        nonce, kind = os.urandom(aead.NONCE_BYTES), entry.kind.encode()
        sealed = aead.seal(self._key, nonce, entry.content, self._associated(self._count, kind))
        # Not joined first: input comes in megabytes, and each copy would be paid for all of it.
        self._stream.write(enc(kind, nonce) + u32(len(sealed)))
        self._stream.write(sealed)
        self._count += 1

    def _recover(self) -> Iterator[Entry]:
        try:
            stream = self._path.open("r+b")
        except FileNotFoundError as error:
            raise self._lost("the file is gone") from error
        with stream:
            whole = 0
            for number, (kind, nonce, sealed) in enumerate(_complete_records(stream)):
                yield self._opened(number, kind, nonce, sealed)
                whole = stream.tell()
            stream.truncate(whole)
            os.fsync(stream.fileno())

    def _opened(self, number: int, kind: bytes, nonce: bytes, sealed: bytes) -> Entry:
        # A record that is complete and does not open may be one that was acknowledged: going on without it could
        # release for a second tuple. So only incomplete ones are cut.
        try:
            content = aead.open_sealed(self._key, nonce, sealed, self._associated(number, kind))
        except SecurityError as error:
            raise self._lost(f"record {number} is damaged") from error
        return Entry(kind.decode(), content)

    def _associated(self, number: int, kind: bytes) -> bytes:
        return self._bound + enc(number, kind)

    def _lost(self, why: str) -> LostRoundError:
        return LostRoundError(f"{self._path}: {why}", hint="this site sits the round out and joins the next one")


def _complete_records(stream: BinaryIO) -> Iterator[list[bytes]]:
    """(kind, nonce, sealed) of each record that is there to its end."""
    while True:
        fields = [_read_field(stream) for _ in range(3)]
        if None in fields:
            return
        yield [field for field in fields if field is not None]


def _read_field(stream: BinaryIO) -> bytes | None:
    prefix = stream.read(_LENGTH_BYTES)
    size = int.from_bytes(prefix, "big")
    if len(prefix) < _LENGTH_BYTES or not 0 < size <= _MOST_BYTES:
        return None
    field = stream.read(size)
    return field if len(field) == size else None
