"""The mask generator: chunked, threaded and whole are one; no keystream is used twice; nothing else is random."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import mpctf_secure
from mpctf_secure.hazmat.prg import CHUNK_BYTES, fill, keystream
from mpctf_secure.parallel import ordered_map
from mpctf_secure.secagg.chunks import LANE_TYPES, Layout
from mpctf_secure.secagg.masks import Mask, MaskedInput, unmask_chunk

PURE = ("hazmat", "secagg", "privacy", "aggregation", "partition", "identity", "rounds")


@pytest.mark.parametrize("bits", [16, 32])
def test_chunked_threaded_and_whole_are_the_same(bits: int) -> None:
    layout = Layout(bits, 3 * CHUNK_BYTES * 8 // bits + 5, 4)
    lanes = np.arange(layout.dimension).astype(LANE_TYPES[bits])
    masks = (Mask(b"\1" * 32, b"\2" * 32, added=True), Mask(b"\3" * 32, b"\4" * 32, added=False))
    masked = MaskedInput(layout, lanes, np.arange(4, dtype="<u8"), masks)
    chunks = list(masked.chunks())
    assert chunks == list(ordered_map(masked.chunk, range(len(layout.sizes))))
    assert [len(chunk) for chunk in chunks] == layout.sizes
    whole = lanes.copy()
    for mask in masks:
        stream = b"".join(_ctr(mask.vector_seed, k, size) for k, size in enumerate(layout.sizes[:-1]))
        whole += np.frombuffer(stream, lanes.dtype) * np.array(1 if mask.added else -1).astype(lanes.dtype)
    assert b"".join(chunks[:-1]) == whole.tobytes()
    opened = [unmask_chunk(iter([chunk]), masks, layout, number) for number, chunk in enumerate(chunks)]
    assert np.array_equal(layout.join(opened)[0], lanes)


def _ctr(seed: bytes, chunk: int, size: int) -> bytes:
    start = chunk.to_bytes(12, "big") + (2).to_bytes(4, "big")
    return Cipher(algorithms.AES(seed), modes.CTR(start)).encryptor().update(bytes(size))


def test_no_two_chunks_share_a_block() -> None:
    """A bare chunk number as counter block would make block j of chunk k equal block j − 1 of chunk k + 1."""
    blocks = [keystream(bytes(32), chunk).reshape(-1, 16) for chunk in range(3)]
    seen = {block.tobytes() for chunk in blocks for block in chunk}
    assert len(seen) == 3 * CHUNK_BYTES // 16
    bare = [
        Cipher(algorithms.AES(bytes(32)), modes.CTR(k.to_bytes(16, "big"))).encryptor().update(bytes(64))
        for k in (0, 1)
    ]
    assert bare[0][16:] == bare[1][:-16]


def test_seeds_one_bit_apart_give_unrelated_streams() -> None:
    streams = [keystream(bytes([bit]) + bytes(31), 0).view("<u2").astype(float) for bit in (0, 1, 2)]
    for one, other in itertools.combinations(streams, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(one.size)


def test_chunk_has_an_end_and_a_seed_32_bytes() -> None:
    for seed, size in ((bytes(31), 1), (bytes(32), CHUNK_BYTES + 1)):
        with pytest.raises(ValueError, match="32 bytes"):
            fill(seed, 0, np.empty(size, np.uint8))


def test_scalar_block_and_first_vector_chunk_have_their_own_streams() -> None:
    layout = Layout(32, 4, 2)
    mask = Mask(b"\1" * 32, b"\2" * 32, added=True)
    vector, scalars = MaskedInput(layout, np.zeros(4, "<u4"), np.zeros(2, "<u8"), (mask,)).chunks()
    assert vector == keystream(mask.vector_seed, 0, 16).tobytes()
    assert scalars == keystream(mask.scalar_seed, 0, 16).tobytes()


@pytest.mark.parametrize("dimension", [0, 1, CHUNK_BYTES // 4, CHUNK_BYTES // 4 + 1])
def test_chunks_lie_one_behind_the_other(dimension: int) -> None:
    layout = Layout(32, dimension, 3)
    ends = list(itertools.accumulate(layout.sizes))
    assert [layout.offset(number) for number in range(len(layout.sizes))] == [0, *ends[:-1]]
    assert ends[-1] == layout.size == 4 * dimension + 24
    assert layout.lane_type(layout.vector_chunks) == np.dtype("<u8")


def test_no_other_randomness_in_the_pure_rooms() -> None:
    root = Path(mpctf_secure.__file__).parent
    forbidden = re.compile(r"\bimport random\b|\bfrom random\b|np\.random|numpy\.random|\bimport secrets\b|random\.")
    sources = [path for room in PURE for path in (root / room).rglob("*.py")]
    assert len(sources) > 20
    assert [str(path) for path in sources if forbidden.search(path.read_text())] == []
