"""What the nodes of one participant use, as its agent tells the coordinator."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from mpctf_secure.errors import DecodeError
from mpctf_secure.hazmat.encoding import Reader, decode_sequence, enc, enc_sequence
from mpctf_secure.monitoring.resources import MOST_BYTES, Resources

MOST_NODES = 64
_MOST_BYTES = 1 << 20  # 64 nodes of 64 GPUs, and no names that a driver would not give


@dataclass(frozen=True)
class Usage:
    """Body of `resources`: a sample of each node that has a new one, by the node's number from 1."""

    nodes: Mapping[int, Resources]

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse; DecodeError for anything but what `encode` makes of at most 64 nodes."""
        if len(body) > _MOST_BYTES:
            raise DecodeError(f"usage has {len(body)} bytes, more than the limit of {_MOST_BYTES}")
        usage = cls(dict(map(_decode_node, decode_sequence(body, MOST_NODES))))
        if usage.encode() != body:
            raise DecodeError("usage is not in its one encoding")
        return usage

    def encode(self) -> bytes:
        """The body."""
        return enc_sequence(enc(node, resources.to_json()) for node, resources in sorted(self.nodes.items()))


def _decode_node(data: bytes) -> tuple[int, Resources]:
    with Reader(data) as reader:
        node, sample = reader.integer(), reader.bytes(limit=MOST_BYTES)
    if not 1 <= node <= MOST_NODES:
        raise DecodeError(f"usage of a node number {node}")
    return node, Resources.from_json(sample)
