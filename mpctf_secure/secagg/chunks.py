"""How an input is cut for travel: ring lanes in chunks of 1 MiB, then one chunk with the scalar block.

Chunk k of the vector is masked with chunk k of each keystream, so any chunk can be made alone, by any thread, and
memory does not grow with the vector.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.prg import CHUNK_BYTES

Lanes = npt.NDArray[np.unsignedinteger[Any]]
"""Ring elements: uint16 or uint32 for the vector, uint64 for scalars; wraparound is the ring's addition."""

LANE_TYPES: Mapping[int, np.dtype[np.unsignedinteger[Any]]] = {
    16: np.dtype("<u2"),
    32: np.dtype("<u4"),
    64: np.dtype("<u8"),
}
SCALAR_BITS = 64


@dataclass(frozen=True)
class Layout:
    """A vector of `dimension` lanes of `bits` bits, and `scalars` lanes of 64 bits behind it."""

    bits: int
    dimension: int
    scalars: int

    @property
    def vector_chunks(self) -> int:
        """Chunks of the vector; the scalar block's number is the same."""
        return -(-self.dimension * self.bits // 8 // CHUNK_BYTES)

    @property
    def sizes(self) -> list[int]:
        """Bytes of every chunk, in order."""
        full, rest = divmod(self.dimension * self.bits // 8, CHUNK_BYTES)
        return [CHUNK_BYTES] * full + [rest] * (rest > 0) + [SCALAR_BITS // 8 * self.scalars]

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return self.bits // 8 * self.dimension + SCALAR_BITS // 8 * self.scalars

    def offset(self, number: int) -> int:
        """Where chunk `number` begins."""
        return min(number * CHUNK_BYTES, self.dimension * self.bits // 8)

    def lane_type(self, number: int) -> np.dtype[np.unsignedinteger[Any]]:
        """What chunk `number` is made of."""
        return LANE_TYPES[self.bits if number < self.vector_chunks else SCALAR_BITS]

    def cut(self, number: int, lanes: Lanes, scalars: Lanes) -> Lanes:
        """A view of the lanes in chunk `number`."""
        if number == self.vector_chunks:
            return scalars
        step = CHUNK_BYTES // lanes.itemsize
        return lanes[number * step : (number + 1) * step]

    def join(self, chunks: Sequence[bytes]) -> tuple[Lanes, Lanes]:
        """Lanes [dimension] and scalars from chunks whose sizes are known to be right."""
        lanes = np.frombuffer(b"".join(chunks[:-1]), LANE_TYPES[self.bits])
        return lanes, np.frombuffer(chunks[-1], LANE_TYPES[SCALAR_BITS])


def digest(chunk_hashes: Iterable[bytes]) -> bytes:
    """The digest of an upload or a sum: SHA-256 over every chunk's SHA-256, so that chunks can be hashed alone."""
    return sha256(b"".join(chunk_hashes))
