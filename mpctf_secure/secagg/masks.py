"""Masks: their keys, and adding or removing them one 1 MiB chunk at a time.

The vector travels as chunks of `CHUNK_BYTES`, little-endian lanes, and behind them the scalar block. Chunk k is
masked with chunk k of each keystream, so any chunk can be made alone, and memory does not grow with the vector.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpctf_secure.hazmat import agreement
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import hkdf, sha256
from mpctf_secure.hazmat.prg import CHUNK_BYTES, keystream
from mpctf_secure.ids import IdentityKey

Lanes = npt.NDArray[np.unsignedinteger[Any]]
"""Ring elements: uint16 or uint32 for the vector, uint64 for scalars; wraparound is the ring's addition."""

LANE_TYPES: Mapping[int, np.dtype[np.unsignedinteger[Any]]] = {
    16: np.dtype("<u2"),
    32: np.dtype("<u4"),
    64: np.dtype("<u8"),
}
SCALAR_BITS = 64


@dataclass(frozen=True)
class Mask:
    """One keystream and its sign in a masked input; the repr hides the seeds."""

    vector_seed: bytes
    scalar_seed: bytes
    added: bool

    def __repr__(self) -> str:
        return "Mask(…)"


def box_key(binding: bytes, private: bytes, public: bytes, sender: bytes, recipient: bytes) -> bytes:
    """The key of the one box from `sender` to `recipient`; `binding` is enc(ctx, adverts hash)."""
    return hkdf(agreement.exchange(private, public), binding + enc("box", sender, recipient))


def self_mask(binding: bytes, owner: IdentityKey, seed: bytes) -> Mask:
    """The mask that hides an upload whose owner the server may claim dropped; always added."""
    vector, scalars = (hkdf(seed, binding + enc(label, owner)) for label in ("self-vector", "self-scalars"))
    return Mask(vector, scalars, added=True)


def pair_mask(binding: bytes, owner: IdentityKey, private: bytes, peer: IdentityKey, public: bytes) -> Mask:
    """The mask that `owner` shares with `peer`: the lower identity adds it, the higher subtracts it."""
    shared = agreement.exchange(private, public)
    pair = sorted((owner, peer))
    vector, scalars = (hkdf(shared, binding + enc(label, *pair)) for label in ("pair-vector", "pair-scalars"))
    return Mask(vector, scalars, added=owner < peer)


def add(lanes: Lanes, seeds: Iterable[tuple[bytes, bool]], chunk: int) -> None:
    """Add (or subtract, where the flag is False) chunk number `chunk` of every keystream, in place."""
    for seed, plus in seeds:
        stream = keystream(seed, chunk, lanes.nbytes).view(lanes.dtype)
        (np.add if plus else np.subtract)(lanes, stream, out=lanes)


def vector_seeds(masks: Sequence[Mask], *, remove: bool = False) -> list[tuple[bytes, bool]]:
    """Seeds and signs for the vector chunks; `remove` turns every sign."""
    return [(mask.vector_seed, mask.added != remove) for mask in masks]


def scalar_seeds(masks: Sequence[Mask], *, remove: bool = False) -> list[tuple[bytes, bool]]:
    """Seeds and signs for the scalar block; `remove` turns every sign."""
    return [(mask.scalar_seed, mask.added != remove) for mask in masks]


def chunk_sizes(bits: int, dimension: int, scalars: int) -> list[int]:
    """Bytes of each chunk of an upload: the vector's, then one for the scalar block."""
    total = bits // 8 * dimension
    full, rest = divmod(total, CHUNK_BYTES)
    return [CHUNK_BYTES] * full + [rest] * (rest > 0) + [SCALAR_BITS // 8 * scalars]


@dataclass(frozen=True)
class MaskedInput:
    """What may leave a participant: lanes and scalars under all masks, chunk by chunk, the same at every reading."""

    lanes: Lanes
    scalars: Lanes
    masks: tuple[Mask, ...]

    def __repr__(self) -> str:
        return f"MaskedInput({self.lanes.size} lanes)"

    def chunks(self) -> Iterator[bytes]:
        """The upload's chunks in order, the scalar block last."""
        step = CHUNK_BYTES // self.lanes.itemsize
        for number, start in enumerate(range(0, self.lanes.size, step)):
            piece = self.lanes[start : start + step].copy()
            add(piece, vector_seeds(self.masks), number)
            yield piece.tobytes()
        block = self.scalars.copy()
        add(block, scalar_seeds(self.masks), 0)
        yield block.tobytes()


def unmask_chunks(
    uploads: Iterable[Sequence[bytes]], bits: int, masks: Sequence[Mask], vector_chunks: int
) -> Iterator[bytes]:
    """The chunks of the true sum, given for each chunk number that chunk of every upload."""
    for number, pieces in enumerate(uploads):
        is_vector = number < vector_chunks
        kind = LANE_TYPES[bits if is_vector else SCALAR_BITS]
        total: Lanes = np.frombuffer(pieces[0], kind).copy()
        for piece in pieces[1:]:
            np.add(total, np.frombuffer(piece, kind), out=total)
        seeds = vector_seeds(masks, remove=True) if is_vector else scalar_seeds(masks, remove=True)
        add(total, seeds, number if is_vector else 0)
        yield total.tobytes()


def digest(chunk_hashes: Iterable[bytes]) -> bytes:
    """The upload's digest: SHA-256 over the SHA-256 of every chunk, so that chunks can be checked alone."""
    return sha256(b"".join(chunk_hashes))
