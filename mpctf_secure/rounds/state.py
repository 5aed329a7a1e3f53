"""The model state of a run: everything the next round depends on, the same bytes at every member."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mpctf_secure.aggregation.lora import Vector, initial_adapter
from mpctf_secure.aggregation.server import initial_moments
from mpctf_secure.errors import DecodeError
from mpctf_secure.hazmat.encoding import Reader, enc, enc_sequence, u64
from mpctf_secure.hazmat.kdf import HASH_BYTES, sha256
from mpctf_secure.hazmat.prg import CHUNK_BYTES
from mpctf_secure.ids import IdentityKey
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.secagg.messages import members

_MOST_HEADER = 1 << 20
_MOST_VECTORS = 3


class Survey(NamedTuple):
    """What `memory_aware` adds up in its first round: Σ|D_j| and Σ|D_j|·M_j, rows and rows times MiB."""

    rows: int
    products: int


@dataclass(frozen=True)
class State:
    """`adapter` [d] and the server optimizer's `moments`, each [d]; a range for each tensor [T]."""

    round: int  # rounds done, void ones among them
    voids: int
    convicted: tuple[IdentityKey, ...]
    """Dealers who were proved to have spoilt a round, ascending: no cohort holds them any more."""
    adapter: Vector
    moments: tuple[Vector, ...]
    ranges: tuple[float, ...]
    """The clip norm where nothing better is known."""
    clip_norm: float
    survey: Survey | None
    history: bytes
    """32 bytes that commit to every outcome so far: who signs a state signs all that was published on the way."""

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """Adapter and moments."""
        return (self.adapter, *self.moments)

    @property
    def header(self) -> bytes:
        """Everything but the vectors."""
        ranges = np.array([self.clip_norm, *self.ranges], "<f8").tobytes()
        survey = enc_sequence(map(u64, self.survey or ()))
        return (
            enc(self.round, self.voids, len(self.vectors), ranges, self.history) + enc_sequence(self.convicted) + survey
        )

    @classmethod
    def decode(cls, header: bytes, body: bytes) -> "State":
        """A state from its header and its vectors, float32 little-endian; DecodeError for bytes that are neither."""
        with Reader(header) as reader:
            number, voids, count, ranges = reader.integer(), reader.integer(), reader.integer(), reader.bytes()
            history, convicted = reader.bytes(HASH_BYTES), members(reader)
            survey = reader.integers(len(Survey._fields))
        if len(ranges) % 8 or not ranges or not 1 <= count <= _MOST_VECTORS or len(survey) == 1:
            raise DecodeError("not the header of a state")
        if len(body) % (4 * count):
            raise DecodeError("state ends within a number")
        adapter, *moments = np.split(np.frombuffer(body, "<f4").astype(np.float32), count)
        clip_norm, *widths = (float(width) for width in np.frombuffer(ranges, "<f8"))
        return cls(
            round=number,
            voids=voids,
            convicted=convicted,
            adapter=adapter,
            moments=tuple(moments),
            ranges=tuple(widths),
            clip_norm=clip_norm,
            survey=Survey(*survey) if survey else None,
            history=history,
        )

    def to_bytes(self) -> bytes:
        """Header and vectors, for a file."""
        return enc(self.header) + b"".join(vector.astype("<f4", copy=False).tobytes() for vector in self.vectors)

    @classmethod
    def from_bytes(cls, data: bytes) -> "State":
        """What `to_bytes` made; DecodeError for anything else."""
        header = Reader(data[:_MOST_HEADER]).bytes()
        return cls.decode(header, data[len(enc(header)) :])

    def chunks(self, first: int = 0) -> Iterator[bytes]:
        """The vectors in pieces of at most CHUNK_BYTES, from number `first` on."""
        each = chunks_of(self.adapter.size)
        for number in range(first, len(self.vectors) * each):
            data = self.vectors[number // each].astype("<f4", copy=False).data.cast("B")
            at = number % each * CHUNK_BYTES
            yield bytes(data[at : at + CHUNK_BYTES])

    def hash(self, contract: Contract) -> bytes:
        """32 bytes that differ wherever anything in the state does."""
        return sha256(enc("mpctf-secure/state/v1", contract.schema_hash, self._body_hash, self.header))

    def after(self, outcome: bytes) -> "State":
        """With one more outcome in its history: the body of a publication or of a void round."""
        return replace(self, history=extend_history(self.history, outcome))

    @functools.cached_property
    def _body_hash(self) -> bytes:
        total = hashlib.sha256()
        for vector in self.vectors:
            total.update(vector.astype("<f4", copy=False).data)
        return total.digest()


def chunks_of(dimension: int) -> int:
    """In how many pieces a float32 vector [d] travels."""
    return -(-4 * dimension // CHUNK_BYTES)


def extend_history(history: bytes, outcome: bytes) -> bytes:
    """RECOVERY.md section 2."""
    return sha256(enc("mpctf-secure/outcome/v1", history, outcome))


def initial_state(contract: Contract) -> State:
    """State 0, a function of the contract. No aggregate is published yet, so every range is the clip norm."""
    adapter = initial_adapter(contract.tensors, contract.seed)
    return State(
        round=0,
        voids=0,
        convicted=(),
        adapter=adapter,
        moments=initial_moments(contract.aggregation, adapter.size),
        ranges=(contract.privacy.clip_norm,) * len(contract.tensors),
        clip_norm=contract.privacy.clip_norm,
        survey=None,
        history=bytes(HASH_BYTES),
    )
