"""Messages of a run around the secure aggregation: all travel as `secagg.messages.Signed`, these are their bodies.

participant → coordinator    hello, facts (in the context roster hash);
                             accept, ready, progress, fetch, transition (run context);
                             advert, shares, upload, consistency, release (attempt context)
coordinator → participant    proposal, contract (roster hash);
                             go, announce, noted, publication, next (run context);
                             adverts, delivery, survivors, signatures, ack (attempt context);
                             skip and abort, in the context of what they answer
"""

from dataclasses import dataclass
from typing import Self

from mpctf_secure.aggregation.lora import Schema
from mpctf_secure.hazmat.encoding import Reader, enc, enc_sequence
from mpctf_secure.hazmat.kdf import HASH_BYTES
from mpctf_secure.ids import IdentityKey

KEY_BYTES = 32


@dataclass(frozen=True)
class Facts:
    """What a site found when it loaded the model: hash of the base, and the LoRA tensors."""

    base_model_hash: bytes
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, base_model_hash: bytes, schema: Schema) -> Self:
        """Facts from a schema."""
        return cls(base_model_hash, tuple((name, tuple(shape)) for name, shape in schema))

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse the body of `facts`."""
        reader = Reader(body)
        base, tensors = reader.bytes(HASH_BYTES), reader.sequence()
        reader.end()
        return cls(base, tuple(map(_decode_tensor, tensors)))

    def encode(self) -> bytes:
        """The body of `facts`."""
        return enc(self.base_model_hash) + enc_sequence(
            enc(name) + enc_sequence(enc(size) for size in shape) for name, shape in self.tensors
        )


def _decode_tensor(data: bytes) -> tuple[str, tuple[int, ...]]:
    reader = Reader(data)
    name, sizes = reader.text(limit=1024), reader.sequence()
    reader.end()
    return name, tuple(map(_decode_integer, sizes))


def _decode_integer(data: bytes) -> int:
    reader = Reader(data)
    value = reader.integer()
    reader.end()
    return value


@dataclass(frozen=True)
class Position:
    """A round and the hash of a state: body of `ready` (state before the round) and `transition` (after it)."""

    round: int
    state_hash: bytes

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        reader = Reader(body)
        position = cls(reader.integer(), reader.bytes(HASH_BYTES))
        reader.end()
        return position

    def encode(self) -> bytes:
        """The body."""
        return enc(self.round, self.state_hash)


@dataclass(frozen=True)
class Progress:
    """How far local training is; says nothing that timing does not."""

    round: int
    step: int
    steps: int

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        reader = Reader(body)
        progress = cls(reader.integer(), reader.integer(), reader.integer())
        reader.end()
        return progress

    def encode(self) -> bytes:
        """The body."""
        return enc(self.round, self.step, self.steps)


@dataclass(frozen=True)
class Announce:
    """Who is in the round's cohort; everything else of the attempt follows from contract and state."""

    round: int
    cohort: tuple[IdentityKey, ...]

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        reader = Reader(body)
        announce = cls(reader.integer(), tuple(map(IdentityKey, reader.sequence(KEY_BYTES))))
        reader.end()
        return announce

    def encode(self) -> bytes:
        """The body."""
        return enc(self.round) + enc_sequence(self.cohort)


@dataclass(frozen=True)
class Publication:
    """The header of a published sum; `digest` covers the chunks that follow it."""

    round: int
    cohort: tuple[IdentityKey, ...]
    survivors: tuple[IdentityKey, ...]
    digest: bytes

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        reader = Reader(body)
        publication = cls(
            reader.integer(),
            tuple(map(IdentityKey, reader.sequence(KEY_BYTES))),
            tuple(map(IdentityKey, reader.sequence(KEY_BYTES))),
            reader.bytes(HASH_BYTES),
        )
        reader.end()
        return publication

    def encode(self) -> bytes:
        """The body."""
        return enc(self.round) + enc_sequence(self.cohort) + enc_sequence(self.survivors) + enc(self.digest)
