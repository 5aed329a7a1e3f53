"""Messages of a run around the secure aggregation: all travel as `secagg.messages.Signed`, these are their bodies.

That of `resources` is `monitoring.usage.Usage`.

participant → coordinator    hello, facts, veto (in the context roster hash; veto also in an attempt's);
                             accept, ready, progress, resources, fault, alive, fetch, behind, log, transition (run
                             context);
                             advert, shares, offset, upload, consistency, release (attempt context)
coordinator → participant    proposal, contract (roster hash);
                             go, announce, noted, publication, void, next, behind, current, state, log (run context);
                             adverts, delivery, held, again, survivors, signatures, ack (attempt context);
                             skip and abort, in the context of what they answer
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self

from mpctf_secure.errors import DecodeError
from mpctf_secure.hazmat.encoding import Reader, enc, enc_sequence, u64
from mpctf_secure.hazmat.kdf import HASH_BYTES, sha256
from mpctf_secure.hazmat.signature import SIGNATURE_BYTES
from mpctf_secure.ids import IdentityKey
from mpctf_secure.secagg.messages import members
from mpctf_secure.secagg.parameters import MAX_COHORT

PROGRESS_PARTS = 20
COSIGNATURE_BYTES = 8 + SIGNATURE_BYTES
"""A time, and an Ed25519 signature."""
STATED = "stated"
"""Memory that a site's operator has stated, so that it may be compared with any other."""


class ModelHashes(NamedTuple):
    """SHA-256 of what a base model consists of, so that a difference can be named."""

    config: bytes
    tokenizer: bytes
    """With the chat template."""
    weights: bytes

    @property
    def whole(self) -> bytes:
        """The base model's hash."""
        return sha256(enc("mpctf-secure/base-model/v1", *self))


@dataclass(frozen=True)
class Facts:
    """What a site found: the hash of its program's files, those of the base model, and the LoRA tensors.

    `size`: its rows, rounded up, where the data strategy needs to know; else 0. `memory`: what it counts in, where the
    strategy weighs sites by memory; else "".
    """

    package: bytes
    base_model: ModelHashes
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    size: int = 0
    memory: str = ""

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse the body of `facts`."""
        with Reader(body) as reader:
            return cls(
                reader.bytes(HASH_BYTES),
                ModelHashes(*(reader.bytes(HASH_BYTES) for _ in ModelHashes._fields)),
                tuple(map(_decode_tensor, reader.sequence())),
                reader.integer(),
                reader.text(limit=16),
            )

    def encode(self) -> bytes:
        """The body of `facts`."""
        tensors = (enc(name) + enc_sequence(map(u64, shape)) for name, shape in self.tensors)
        return enc(self.package, *self.base_model) + enc_sequence(tensors) + enc(self.size, self.memory)


def _decode_tensor(data: bytes) -> tuple[str, tuple[int, ...]]:
    with Reader(data) as reader:
        return reader.text(limit=1024), reader.integers()


class FaultCode(StrEnum):
    """Why a training job failed: a closed list, so that others may hear of it without hearing of data."""

    BAD_DATA = "bad_data"
    BAD_MODEL = "bad_model"
    NO_GPU = "no_gpu"
    OUT_OF_MEMORY = "out_of_memory"
    UNREACHABLE = "unreachable"
    NO_START = "no_start"
    DIVERGED = "diverged"
    KILLED = "killed"
    HANG = "hang"
    DEFECT = "defect"


@dataclass(frozen=True)
class TrainingFault:
    """Body of `fault`: which process of a site's job failed, why, and whether the site starts the job again."""

    code: FaultCode
    node: int
    rank: int
    again: bool

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        with Reader(body) as reader:
            code, node, rank, again = reader.text(limit=32), reader.integer(), reader.integer(), reader.integer()
        if code not in set(FaultCode) or again > 1:
            raise DecodeError("not the fault of a training job")
        return cls(FaultCode(code), node, rank, bool(again))

    def encode(self) -> bytes:
        """The body."""
        return enc(self.code, self.node, self.rank, int(self.again))


@dataclass(frozen=True)
class Position:
    """A round and the hash of a state: body of `ready` (state before the round) and `transition` (after it)."""

    round: int
    state_hash: bytes

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        with Reader(body) as reader:
            return cls(reader.integer(), reader.bytes(HASH_BYTES))

    def encode(self) -> bytes:
        """The body."""
        return enc(self.round, self.state_hash)


@dataclass(frozen=True)
class Progress:
    """How far local training is, in parts of PROGRESS_PARTS: the number of its steps would be that of its rows."""

    round: int
    done: int

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        with Reader(body) as reader:
            progress = cls(reader.integer(), reader.integer())
        if progress.done > PROGRESS_PARTS:
            raise DecodeError("not the progress of a round")
        return progress

    def encode(self) -> bytes:
        """The body."""
        return enc(self.round, self.done)


@dataclass(frozen=True)
class Announce:
    """An attempt and who may take part in it; everything else of it follows from contract and state."""

    round: int
    attempt: int
    cohort: tuple[IdentityKey, ...]
    first_cohort: tuple[IdentityKey, ...]
    """The cohort of the round's attempt 1."""

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        with Reader(body) as reader:
            return cls(reader.integer(), reader.integer(), members(reader), members(reader))

    def encode(self) -> bytes:
        """The body."""
        return enc(self.round, self.attempt) + enc_sequence(self.cohort) + enc_sequence(self.first_cohort)


@dataclass(frozen=True)
class Fetch:
    """Asks what became of a round, or for the state after it: body of `fetch` and `behind`."""

    position: Position
    """Of the round, and of the state that the asking site holds."""
    attempt: int = 0
    """The round's last attempt that it knows, 0: none."""
    held: int = 0
    """How many pieces behind the header it has of an answer that broke off; the answer goes on there."""

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        with Reader(body) as reader:
            return cls(Position.decode(reader.bytes()), reader.integer(), reader.integer())

    def encode(self) -> bytes:
        """The body."""
        return enc(self.position.encode(), self.attempt, self.held)


@dataclass(frozen=True)
class Witnessed:
    """Body of `accept` and `transition`: what is said, and that its sender has seen the log of this step.

    `cosignature` is that of the step's checkpoint, time and signature; `head` commits to the sender's own log.
    """

    said: bytes
    """A `Choice`, or a `Position`."""
    cosignature: bytes
    head: bytes

    @property
    def time(self) -> int:
        """When it was cosigned, by its sender's clock, in seconds since 1970."""
        return int.from_bytes(self.cosignature[:-SIGNATURE_BYTES], "big")

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        with Reader(body) as reader:
            return cls(reader.bytes(), reader.bytes(COSIGNATURE_BYTES), reader.bytes(HASH_BYTES))

    def encode(self) -> bytes:
        """The body."""
        return enc(self.said, self.cosignature, self.head)


@dataclass(frozen=True)
class Certificate:
    """A step's checkpoint as the coordinator signed it, and the signed messages of those who have witnessed it."""

    note: bytes
    messages: tuple[bytes, ...]

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse; the signatures are checked one by one."""
        with Reader(data) as reader:
            return cls(reader.bytes(), tuple(reader.sequence(max_items=MAX_COHORT)))

    def encode(self) -> bytes:
        """The bytes that travel, and of which the next step's log has the hash."""
        return enc(self.note) + enc_sequence(self.messages)


@dataclass(frozen=True)
class LogRequest:
    """Asks for a step's checkpoint and the leaves below it from number `size` on; `held` as in `Fetch`."""

    step: int
    size: int
    held: int = 0

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        with Reader(body) as reader:
            return cls(reader.integer(), reader.integer(), reader.integer())

    def encode(self) -> bytes:
        """The body of `log`."""
        return enc(self.step, self.size, self.held)


@dataclass(frozen=True)
class Publication:
    """The header of a published sum: which attempt, whose inputs; `digest` covers the chunks that follow it."""

    announce: Announce
    survivors: tuple[IdentityKey, ...]
    digest: bytes

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        with Reader(body) as reader:
            return cls(Announce.decode(reader.bytes()), members(reader), reader.bytes(HASH_BYTES))

    def encode(self) -> bytes:
        """The body."""
        return enc(self.announce.encode()) + enc_sequence(self.survivors) + enc(self.digest)


@dataclass(frozen=True)
class Void:
    """A round that cannot be finished: its last attempt, why, and the proof against a dealer where there is one."""

    announce: Announce
    reason: str
    proof: bytes

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse; the proof is checked with the attempt's context."""
        with Reader(body) as reader:
            return cls(Announce.decode(reader.bytes()), reader.text(limit=1024), reader.bytes())

    def encode(self) -> bytes:
        """The body."""
        return enc(self.announce.encode(), self.reason, self.proof)


@dataclass(frozen=True)
class Caught:
    """What goes before the outcomes and the adapter for one who was away: the state's header and its certificate."""

    header: bytes
    outcomes: int
    certificate: bytes

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse."""
        with Reader(body) as reader:
            return cls(reader.bytes(), reader.integer(), reader.bytes())

    def encode(self) -> bytes:
        """The body."""
        return enc(self.header, self.outcomes, self.certificate)


def round_of(label: str, body: bytes) -> int | None:
    """The round in the body of a stage of the run; None for what belongs to an attempt, or to no round."""
    if label == "transition":
        body = Witnessed.decode(body).said
    return Position.decode(body).round if label in {"ready", "transition"} else None
