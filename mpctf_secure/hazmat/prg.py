"""The one random generator for anything derived: AES-256-CTR, seekable by chunk.

Chunk k of a seed is the 1 MiB keystream whose initial counter block is u96be(k) ‖ u32be(2). A chunk has 2¹⁶ blocks, so
the low word never wraps into the chunk number and no two chunks share keystream; a bare chunk counter as the counter
block would make block j of chunk k equal block j − 1 of chunk k + 1. Starting at 2 makes the bytes equal those of
AES-256-GCM over zeros with nonce u96be(k) (NIST SP 800-38D), which allows another implementation.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import hkdf

T = TypeVar("T")
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""How the work on many chunks is done: like the built-in `map`; a caller with threads to spare brings its own."""

SEED_BYTES = 32
CHUNK_BYTES = 1 << 20
_FIRST_BLOCK = 2
_ZEROS = bytes(CHUNK_BYTES)


def fill(seed: bytes, chunk: int, target: npt.NDArray[np.uint8]) -> None:
    """Write the first bytes of chunk number `chunk` over `target`, at most `CHUNK_BYTES`."""
    if len(seed) != SEED_BYTES or target.size > CHUNK_BYTES:
        raise ValueError("a seed has 32 bytes and a chunk at most 2^20")
    counter_block = chunk.to_bytes(12, "big") + _FIRST_BLOCK.to_bytes(4, "big")
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(counter_block)).encryptor()
    encryptor.update_into(memoryview(_ZEROS)[: target.size], target.data)


def keystream(seed: bytes, chunk: int, length: int = CHUNK_BYTES) -> npt.NDArray[np.uint8]:
    """The first `length` bytes of one chunk, as a fresh array."""
    stream = np.empty(length, np.uint8)
    fill(seed, chunk, stream)
    return stream


class Generator:
    """Uniform draws from the keystream of one seed, in order. Same seed, same draws, on every machine."""

    @classmethod
    def of(cls, seed: int, label: str, *which: str | int) -> Self:
        """One of those that belong to a run's public seed, for one purpose."""
        return cls(hkdf(enc(seed), enc(f"mpctf-secure/{label}/v1", *which)))

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._chunk = 0
        self._left = keystream(seed, 0)

    def bytes(self, length: int) -> npt.NDArray[np.uint8]:
        """The next `length` bytes."""
        pieces = []
        while length > self._left.size:
            pieces.append(self._left)
            length -= self._left.size
            self._chunk += 1
            self._left = keystream(self._seed, self._chunk)
        pieces.append(self._left[:length])
        self._left = self._left[length:]
        return np.concatenate(pieces)

    def uint32(self, count: int) -> npt.NDArray[np.uint32]:
        """`count` uniform 32-bit integers."""
        return self.bytes(4 * count).view("<u4")

    def below(self, bound: int) -> int:
        """A uniform integer in [0, bound) for bound ≤ 2³², by rejection, so without bias."""
        limit = (1 << 32) - (1 << 32) % bound
        while (draw := int(self.uint32(1)[0])) >= limit:
            pass
        return draw % bound

    def permutation(self, size: int) -> list[int]:
        """A uniform permutation of 0 … size − 1 (Fisher and Yates)."""
        order = list(range(size))
        for last in range(size - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]
