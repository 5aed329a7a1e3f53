"""Canonical, length-prefixed encoding: one byte string for one value, decoded without slack.

enc(f1, f2, …) is u32be(length) ‖ bytes for each field; integers are u64be; a sequence is u32be(count) followed by
its items, each length-prefixed. Decoding refuses anything that encoding would not have produced.
"""

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from mpctf_secure.errors import DecodeError

MAX_FIELD_BYTES = 1 << 26
MAX_ITEMS = 1 << 20  # tensors of a schema; sets of members have their own limit


def u32(value: int) -> bytes:
    """Four bytes, big-endian; OverflowError outside [0, 2³²)."""
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    """Eight bytes, big-endian; OverflowError outside [0, 2⁶⁴)."""
    return value.to_bytes(8, "big")


def enc(*fields: bytes | str | int) -> bytes:
    """Concatenate the fields, each behind its length; text is UTF-8, integers are u64be."""
    return b"".join(u32(len(raw)) + raw for raw in map(_raw, fields))


def enc_sequence(items: Iterable[bytes]) -> bytes:
    """u32be(count), then every item behind its length. The caller orders the items of a set."""
    listed = list(items)
    return u32(len(listed)) + enc(*listed)


def _raw(field: bytes | str | int) -> bytes:
    if isinstance(field, bytes):
        return field
    return field.encode() if isinstance(field, str) else u64(field)


class Reader:
    """Reads what `enc` wrote; every method raises DecodeError on bytes that `enc` cannot have written."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def bytes(self, length: int | None = None, limit: int = MAX_FIELD_BYTES) -> bytes:
        """The next field; `length` demands an exact size."""
        size = int.from_bytes(self._take(4), "big")
        if size > limit:
            raise DecodeError(f"field of {size} bytes is longer than the limit of {limit}")
        if length is not None and size != length:
            raise DecodeError(f"field has {size} bytes instead of {length}")
        return self._take(size)

    def text(self, limit: int = 256) -> str:
        """The next field as UTF-8 text."""
        try:
            return self.bytes(limit=limit).decode()
        except UnicodeDecodeError as error:
            raise DecodeError("text field is not UTF-8") from error

    def integer(self) -> int:
        """The next field as u64be."""
        return int.from_bytes(self.bytes(8), "big")

    def sequence(self, length: int | None = None, max_items: int = MAX_ITEMS) -> list[bytes]:  # type: ignore[valid-type]
        """The items of one `enc_sequence` embedded at this point; `length` demands the size of every item."""
        count = int.from_bytes(self._take(4), "big")
        if count > max_items:
            raise DecodeError(f"sequence of {count} items is longer than the limit of {max_items}")
        return [self.bytes(length) for _ in range(count)]

    def integers(self, max_items: int = MAX_ITEMS) -> tuple[int, ...]:
        """The items of a sequence of integers."""
        return tuple(int.from_bytes(item, "big") for item in self.sequence(8, max_items))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Refuse trailing bytes: a message has one encoding only."""
        if error is None and self._at != len(self._data):
            raise DecodeError(f"{len(self._data) - self._at} bytes after the end of the message")

    def _take(self, size: int) -> bytes:  # type: ignore[valid-type]
        piece = self._data[self._at : self._at + size]
        if len(piece) != size:
            raise DecodeError(f"message ends {size - len(piece)} bytes too early")
        self._at += size
        return piece


def decode_sequence(data: bytes, max_items: int) -> Sequence[bytes]:
    """The items of a byte string that is one `enc_sequence` and nothing else."""
    with Reader(data) as reader:
        return reader.sequence(max_items=max_items)
