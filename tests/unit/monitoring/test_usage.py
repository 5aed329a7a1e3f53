from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mpctf_secure.errors import DecodeError
from mpctf_secure.hazmat.encoding import enc, enc_sequence
from mpctf_secure.monitoring.resources import MOST_GPUS, Gpu, Resources
from mpctf_secure.monitoring.usage import MOST_NODES, Usage

SAMPLE = Resources(0.4, *[1 << 33] * 6, (Gpu(0, "NVIDIA H200", 1 << 36, 1 << 37, 0.4, 61),))
IDLE = replace(SAMPLE, cpu=0.0, gpus=())
NODES = st.dictionaries(st.integers(1, MOST_NODES), st.sampled_from([SAMPLE, IDLE]), max_size=4)


def body(*nodes: tuple[int, bytes]) -> bytes:
    return enc_sequence(enc(number, sample) for number, sample in nodes)


def decodes_or_refuses(data: bytes) -> None:
    try:
        usage = Usage.decode(data)
    except DecodeError:
        return
    assert usage.encode() == data


@given(NODES)
def test_what_is_written_is_read(nodes: dict[int, Resources]) -> None:
    assert Usage.decode(Usage(nodes).encode()).nodes == nodes


@example(b"")
@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda data: body((1, data))))
def test_any_bytes_give_usage_or_a_decode_error(data: bytes) -> None:
    decodes_or_refuses(data)


@given(NODES, st.integers(0, 2000), st.integers(0, 7), st.integers(0, 2000))
def test_spoilt_bytes_give_usage_or_a_decode_error(nodes: dict[int, Resources], at: int, bit: int, cut: int) -> None:
    data = bytearray(Usage(nodes).encode())
    data[at % len(data)] ^= 1 << bit
    decodes_or_refuses(bytes(data[: len(data) - cut % len(data)]))


GOOD = SAMPLE.to_json()
REFUSED = {
    "no node 0": body((0, GOOD)),
    "a node too many": body(*((number, GOOD) for number in range(1, MOST_NODES + 2))),
    "a number too high": body((MOST_NODES + 1, GOOD)),
    "a node twice": body((1, GOOD), (1, GOOD)),
    "another order": body((2, GOOD), (1, GOOD)),
    "JSON with spaces": body((1, GOOD + b" ")),
    "no sample": body((1, b"{}")),
    "more bytes than any has": body((1, GOOD)).ljust((1 << 20) + 1),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_out_of_bounds(data: bytes) -> None:
    with pytest.raises(DecodeError):
        Usage.decode(data)


def test_largest_site_is_within_the_limits() -> None:
    gpu = Gpu(MOST_GPUS - 1, "NVIDIA RTX PRO 6000 Blackwell Max-Q", 1 << 40, 1 << 40, 0.99, 100)
    largest = Usage(dict.fromkeys(range(1, MOST_NODES + 1), Resources(0.99, *[1 << 50] * 6, (gpu,) * MOST_GPUS)))
    assert Usage.decode(largest.encode()) == largest
