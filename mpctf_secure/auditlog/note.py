"""Signed notes, and checkpoints as their text: c2sp.org/signed-note, /tlog-checkpoint and /tlog-cosignature, v1.

A note is text, an empty line, and a line for each signature: `— NAME BASE64(key id ‖ signature)`. Who reads one looks
for the signatures of keys that it knows, and lets others be, as the format asks: anybody may add one.
"""

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from mpctf_secure.errors import DecodeError, SecurityError
from mpctf_secure.hazmat import signature
from mpctf_secure.hazmat.encoding import u64
from mpctf_secure.hazmat.kdf import HASH_BYTES, sha256
from mpctf_secure.hazmat.signature import KEY_BYTES, SIGNATURE_BYTES, SigningKey

MOST_BYTES = 1 << 16
"""Of a note; with the cosignatures of a hundred participants it has a fifth of that."""
_LOG, _COSIGNER = 1, 4  # the format's numbers for Ed25519, and for Ed25519 with a time by a witness
_KEY_ID_BYTES, _TIME_BYTES = 4, 8
_MOST_SIGNATURES = 256
_LEAST_LINES = 4  # origin, size, root, and nothing behind the last line end
_MOST_SIZE = 1 << 63
_MOST_SECONDS = 253_402_300_799  # the end of the year 9999
_NUMBER = re.compile("0|[1-9][0-9]{0,18}")
_NAME = re.compile(r"[^\s+\x00-\x1f\x7f]{1,255}")


@dataclass(frozen=True)
class Key:
    """A public key and the name under which it signs."""

    name: str
    public: bytes

    def id_of(self, kind: int) -> bytes:
        """Which key a signature claims to be of; no proof of anything."""
        return sha256(f"{self.name}\n".encode() + bytes([kind]) + self.public)[:_KEY_ID_BYTES]

    @property
    def cosigner_id(self) -> bytes:
        """Its id as a witness's."""
        return self.id_of(_COSIGNER)

    @property
    def vkey(self) -> str:
        """As other programs take it: NAME+ID+BASE64(1 ‖ key)."""
        encoded = base64.b64encode(bytes([_LOG]) + self.public).decode()
        return f"{self.name}+{self.id_of(_LOG).hex()}+{encoded}"

    @classmethod
    def from_vkey(cls, text: str) -> Self:
        """A log's key; DecodeError for anything else."""
        name, key_id, encoded = [*text.split("+", 2), "", ""][:3]
        data = _from_base64(encoded)
        key = cls(name, data[1:])
        if data[:1] != bytes([_LOG]) or len(key.public) != KEY_BYTES or key.id_of(_LOG).hex() != key_id:
            raise DecodeError(f"{text[:100]}: not the key of a log")
        return key


@dataclass(frozen=True)
class Checkpoint:
    """A tree head: which log, how many leaves, their root; more lines mean nothing here, and are signed too."""

    origin: str
    size: int
    root: bytes
    extra: tuple[str, ...] = ()

    @classmethod
    def decode(cls, text: str) -> Self:
        """From a note's text; DecodeError for anything else."""
        lines = text.split("\n")
        if len(lines) < _LEAST_LINES or not all(lines[:-1]) or not _NUMBER.fullmatch(lines[1]):
            raise DecodeError("not a checkpoint")
        origin, size, root, *extra = lines[:-1]
        checkpoint = cls(origin, int(size), _from_base64(root), tuple(extra))
        if checkpoint.size >= _MOST_SIZE or len(checkpoint.root) != HASH_BYTES or checkpoint.encode() != text:
            raise DecodeError("not a checkpoint")
        return checkpoint

    def encode(self) -> str:
        """The note's text."""
        lines = (self.origin, str(self.size), base64.b64encode(self.root).decode(), *self.extra)
        return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True)
class Line:
    """One signature: the name and id of its key as they are claimed, and its bytes."""

    name: str
    key_id: bytes
    signature: bytes

    def encode(self) -> str:
        """The line, with its end."""
        return f"— {self.name} {base64.b64encode(self.key_id + self.signature).decode()}\n"


@dataclass(frozen=True)
class Note:
    """Text and signatures; parsed is not verified."""

    text: str
    lines: tuple[Line, ...] = ()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse; DecodeError for what is no signed note, or has another encoding than the one."""
        try:
            text, found, rest = data[: MOST_BYTES + 1].decode().rpartition("\n\n")
        except UnicodeDecodeError as error:
            raise DecodeError("note is not UTF-8") from error
        lines = rest.splitlines(keepends=True)
        if not found or not lines or len(data) > MOST_BYTES or len(lines) > _MOST_SIGNATURES:
            raise DecodeError("not a signed note")
        note = cls(text + "\n", tuple(map(_decode_line, lines)))
        if note.encode() != data or any(ord(character) < ord(" ") for character in note.text if character != "\n"):
            raise DecodeError("signed note has lines that none may have")
        return note

    def encode(self) -> bytes:
        """The note's bytes."""
        return f"{self.text}\n{''.join(line.encode() for line in self.lines)}".encode()

    def signed(self, name: str, key: SigningKey) -> Self:
        """With the signature of a log."""
        made = Key(name, key.public)
        return self.with_lines([Line(name, made.id_of(_LOG), key.sign(self.text.encode()))])

    def cosigned(self, name: str, key: SigningKey, seconds: int) -> Line:
        """A witness's signature: that at this time it knew no contrary checkpoint; `seconds` since 1970."""
        made = Key(name, key.public)
        return Line(name, made.id_of(_COSIGNER), u64(seconds) + key.sign(_to_cosign(self.text, seconds)))

    def with_lines(self, lines: Iterable[Line]) -> Self:
        """With more signatures."""
        return replace(self, lines=(*self.lines, *lines))

    def verify(self, key: Key) -> None:
        """Return None if this log has signed it; SecurityError otherwise."""
        for line in self._lines_of(key, _LOG):
            signature.verify(key.public, self.text.encode(), line.signature)
            return
        raise SecurityError(f"not signed by {key.name}", culprits=[key.name])

    def checkpoint(self, key: Key) -> Checkpoint:
        """What it says, if this log has signed it as its own; SecurityError otherwise."""
        self.verify(key)
        checkpoint = Checkpoint.decode(self.text)
        if checkpoint.origin != key.name:
            raise SecurityError(f"checkpoint of {checkpoint.origin}, not of {key.name}", culprits=[key.name])
        return checkpoint

    def cosigned_at(self, key: Key) -> int | None:
        """When this witness has signed it, in seconds since 1970, or None; SecurityError for a forgery."""
        for line in self._lines_of(key, _COSIGNER):
            time, signed = line.signature[:_TIME_BYTES], line.signature[_TIME_BYTES:]
            seconds = int.from_bytes(time, "big")
            if len(signed) != SIGNATURE_BYTES or seconds > _MOST_SECONDS:
                raise SecurityError(f"cosignature of {key.name} cannot be one", culprits=[key.name])
            signature.verify(key.public, _to_cosign(self.text, seconds), signed)
            return seconds
        return None

    def _lines_of(self, key: Key, kind: int) -> list[Line]:
        return [line for line in self.lines if (line.name, line.key_id) == (key.name, key.id_of(kind))][:1]


def _to_cosign(text: str, seconds: int) -> bytes:
    return f"cosignature/v1\ntime {seconds}\n{text}".encode()


def _decode_line(line: str) -> Line:
    dash, _, rest = line.partition(" ")
    name, _, encoded = rest.removesuffix("\n").partition(" ")
    data = _from_base64(encoded)
    if dash != "—" or not _NAME.fullmatch(name) or len(data) <= _KEY_ID_BYTES:
        raise DecodeError("not a signature line of a note")
    return Line(name, data[:_KEY_ID_BYTES], data[_KEY_ID_BYTES:])


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DecodeError("not base64") from error
