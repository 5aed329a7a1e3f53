"""Proofs that single leaves are in a log, for whoever has no more of it than its checkpoint: RFC 6962, section 2.1.

As JSON, hashes in base64: `checkpoint`, a signed note; `leaves`, each with `index`, `leaf` and `inclusion`; and, where
it is also shown that the log continues its first `since` leaves, their `root` and `consistency`.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mpctf_secure.auditlog.merkle import Tree, leaf_hash, verify_consistency, verify_inclusion
from mpctf_secure.auditlog.note import Checkpoint, Key, Note
from mpctf_secure.errors import DecodeError


@dataclass(frozen=True)
class Included:
    """A leaf, its number, and the hashes that lead from it to the checkpoint's root."""

    index: int
    leaf: bytes
    path: tuple[bytes, ...]


@dataclass(frozen=True)
class Continued:
    """The tree that the log was before, and the hashes that lead from it to the checkpoint's root."""

    size: int
    root: bytes
    path: tuple[bytes, ...]


@dataclass(frozen=True)
class Proof:
    """Parsed is not verified."""

    note: Note
    leaves: tuple[Included, ...]
    since: Continued | None = None

    @classmethod
    def of(cls, tree: Tree, note: Note, lines: Sequence[bytes], wanted: Iterable[int], since: int | None) -> Self:
        """That leaves are below a checkpoint of this log; `lines` are the leaves' bytes."""
        size = Checkpoint.decode(note.text).size
        leaves = tuple(Included(number, lines[number], tuple(tree.inclusion(number, size))) for number in wanted)
        before = Continued(since, tree.root(since), tuple(tree.consistency(since, size))) if since else None
        return cls(note, leaves, before)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """From its JSON; DecodeError for anything else."""
        try:
            content = json.loads(data)
            leaves = tuple(
                Included(_number(one["index"]), one["leaf"].encode(), _decoded(one["inclusion"]))
                for one in content["leaves"]
            )
            since = None
            if "since" in content:
                (root,) = _decoded([content["root"]])
                since = Continued(_number(content["since"]), root, _decoded(content["consistency"]))
            note = content["checkpoint"].encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DecodeError("not a proof", hint="mpctf-secure audit prove writes one") from error
        return cls(Note.decode(note), leaves, since)

    def encode(self) -> bytes:
        """Its JSON."""
        content: dict[str, Any] = {
            "checkpoint": self.note.encode().decode(),
            "leaves": [
                {"index": one.index, "leaf": one.leaf.decode(), "inclusion": _encoded(one.path)} for one in self.leaves
            ],
        }
        if self.since:
            (root,) = _encoded([self.since.root])
            content |= {"since": self.since.size, "root": root, "consistency": _encoded(self.since.path)}
        return json.dumps(content, indent=2, ensure_ascii=False).encode()

    def verify(self, key: Key) -> Checkpoint:
        """The checkpoint, if this log has signed it and all that is claimed leads to it; SecurityError otherwise."""
        checkpoint = self.note.checkpoint(key)
        for one in self.leaves:
            verify_inclusion(leaf_hash(one.leaf), one.index, checkpoint.size, checkpoint.root, one.path)
        if self.since:
            verify_consistency(self.since.size, checkpoint.size, self.since.root, checkpoint.root, self.since.path)
        return checkpoint


def _number(value: object) -> int:
    if type(value) is not int:  # True is an int, too
        raise TypeError("not a number")
    return value


def _decoded(hashes: object) -> tuple[bytes, ...]:
    if not isinstance(hashes, list):
        raise TypeError("not a list")
    return tuple(base64.b64decode(one, validate=True) for one in hashes)


def _encoded(hashes: Iterable[bytes]) -> list[str]:
    return [base64.b64encode(one).decode() for one in hashes]
