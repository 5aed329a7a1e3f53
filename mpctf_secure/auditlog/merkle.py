"""The Merkle tree of RFC 6962 (section 2.1) over SHA-256, its proofs, and who may believe them.

A `Tree` keeps the hash of every complete subtree, 64 bytes a leaf, so that roots and proofs take logarithmic time.
"""

from collections.abc import Iterable, Sequence
from typing import Self

from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.kdf import HASH_BYTES, sha256

EMPTY_ROOT = sha256(b"")


def leaf_hash(leaf: bytes) -> bytes:
    """Of a leaf's content; the prefix keeps a node from being taken for a leaf."""
    return sha256(b"\0" + leaf)


def _node_hash(left: bytes, right: bytes) -> bytes:
    return sha256(b"\1" + left + right)


class Tree:
    """Leaf hashes, in their order; only appended to."""

    def __init__(self, leaf_hashes: Iterable[bytes] = ()) -> None:
        self._levels = [bytearray()]  # of each level the hashes of its complete subtrees, from the left
        for one in leaf_hashes:
            self.append(one)

    def copy(self) -> Self:
        """One that goes on by itself."""
        other = type(self)()
        other._levels = [bytearray(level) for level in self._levels]
        return other

    def __len__(self) -> int:
        return len(self._levels[0]) // HASH_BYTES

    def append(self, hashed: bytes) -> None:
        """One more leaf, given by its hash."""
        level = 0
        self._levels[0] += hashed
        while len(self._levels[level]) % (2 * HASH_BYTES) == 0:
            pair = self._levels[level][-2 * HASH_BYTES :]
            if level + 1 == len(self._levels):
                self._levels.append(bytearray())
            self._levels[level + 1] += sha256(b"\1" + pair)
            level += 1

    def root(self, size: int | None = None) -> bytes:
        """Of the first `size` leaves, by default of all; ValueError for more than there are."""
        size = len(self) if size is None else size
        self._check(size, len(self))
        return self._hash_of(0, size)

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """PATH(m, D[n]), RFC 6962 section 2.1.1: that leaf `index` is among the first `size`."""
        self._check(size, len(self))
        self._check(index + 1, size)
        proof, start, end = list[bytes](), 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                proof.append(self._hash_of(middle, end))
                end = middle
            else:
                proof.append(self._hash_of(start, middle))
                start = middle
        return proof[::-1]

    def consistency(self, old: int, size: int) -> list[bytes]:
        """PROOF(m, D[n]), RFC 6962 section 2.1.2: that the tree of `size` leaves continues that of the first `old`."""
        self._check(size, len(self))
        self._check(old, size)
        proof, start, end = list[bytes](), 0, size
        while 0 < old < end:
            middle = start + _split(end - start)
            if old <= middle:
                proof.append(self._hash_of(middle, end))
                end = middle
            else:
                proof.append(self._hash_of(start, middle))
                start = middle
        if start:  # else the old root is itself a node, which the verifier has
            proof.append(self._hash_of(start, end))
        return proof[::-1]

    @staticmethod
    def _check(number: int, most: int) -> None:
        if not 0 <= number <= most:
            raise ValueError(f"{number} of {most} leaves")

    def _hash_of(self, start: int, end: int) -> bytes:
        """MTH(D[start:end]) of a subtree that the recursion of the RFC meets."""
        width = end - start
        if width == 0:
            return EMPTY_ROOT
        if width & (width - 1) == 0:
            level, at = width.bit_length() - 1, start // width * HASH_BYTES
            return bytes(self._levels[level][at : at + HASH_BYTES])
        middle = start + _split(width)
        return _node_hash(self._hash_of(start, middle), self._hash_of(middle, end))


def _split(width: int) -> int:
    """The largest power of two below `width`."""
    return 1 << (width - 1).bit_length() - 1


def verify_inclusion(hashed: bytes, index: int, size: int, root: bytes, proof: Sequence[bytes]) -> None:
    """Return None if a leaf with this hash is number `index` of the `size` below the root (RFC 9162, 2.1.3.2).

    SecurityError otherwise. The caller still owes that the root is signed.
    """
    if not 0 <= index < size:
        raise SecurityError(f"leaf {index} of a tree of {size}")
    if len(hashed) != HASH_BYTES:
        raise SecurityError(f"leaf hash of {len(hashed)} bytes")
    number, last, computed = index, size - 1, hashed
    for sibling in proof:
        if last == 0:
            raise SecurityError("inclusion proof is too long")
        if number & 1 or number == last:
            computed = _node_hash(sibling, computed)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            computed = _node_hash(computed, sibling)
        number, last = number >> 1, last >> 1
    if last or computed != root:
        raise SecurityError(f"inclusion proof of leaf {index} does not lead to the root of {size} leaves")


def verify_consistency(old: int, size: int, old_root: bytes, root: bytes, proof: Sequence[bytes]) -> None:
    """Return None if the tree of `size` leaves begins with the `old` leaves of the other root (RFC 9162, 2.1.4.2).

    SecurityError otherwise, and for the empty tree, which every tree continues without a proof.
    """
    if not 0 < old <= size:
        raise SecurityError(f"no tree of {size} leaves can be shown to continue one of {old}")
    verify_subtree(0, old, size, old_root, root, proof)


def verify_subtree(start: int, end: int, size: int, part: bytes, root: bytes, proof: Sequence[bytes]) -> None:
    """Return None if `part` is the root of the leaves from `start` on, before `end`, in the tree of the other root.

    SecurityError otherwise (draft-ietf-plants-merkle-tree-certs, section 4.4; from the first leaf on it is RFC 9162's).
    """
    if start == end and part == EMPTY_ROOT and not proof:
        return
    if not 0 <= start < end <= size or start % (1 << (end - start - 1).bit_length()):
        raise SecurityError(f"leaves {start} to {end} are no subtree of {size}")
    first, number, last, path = start, end - 1, size - 1, list(proof)
    while first != number and (number & 1 or number == last):
        first, number, last = first >> 1, number >> 1, last >> 1
    if first == number:  # the part is itself a node
        path.insert(0, part)
    if not path:
        raise SecurityError("consistency proof is empty")
    of_part = of_whole = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise SecurityError("consistency proof is too long")
        if number & 1 or number == last:
            of_part = _node_hash(sibling, of_part) if first < number else of_part
            of_whole = _node_hash(sibling, of_whole)
            while not number & 1 and number:
                first, number, last = first >> 1, number >> 1, last >> 1
        else:
            of_whole = _node_hash(of_whole, sibling)
        first, number, last = first >> 1, number >> 1, last >> 1
    if last or of_part != part or of_whole != root:
        raise SecurityError(f"consistency proof does not lead from {end} to {size} leaves")
