"""The model state of a run, and the one function that makes the next one from a published sum."""

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpctf_secure.aggregation import fedavg
from mpctf_secure.aggregation.lora import Vector, initial_adapter
from mpctf_secure.errors import COORDINATOR, DecodeError, ParticipationError, SecurityError
from mpctf_secure.hazmat.encoding import Reader, enc, enc_sequence
from mpctf_secure.hazmat.kdf import HASH_BYTES, sha256
from mpctf_secure.hazmat.prg import CHUNK_BYTES
from mpctf_secure.ids import IdentityKey
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.secagg.chunks import Lanes, Layout
from mpctf_secure.secagg.codec import SCALAR_NAMES, Grid, Run, decode_mean, decode_scalars
from mpctf_secure.secagg.messages import KEY_BYTES
from mpctf_secure.secagg.parameters import MAX_COHORT, Context

NARROW_BITS, WIDE_BITS = 16, 32
MOST_IN_NARROW_RING = 16
MOST_CLIPPED = 0.01
_HEADROOM = 8.0
_SMALLEST_RANGE = 2.0**-20
_MOST_HEADER = 1 << 20


@dataclass(frozen=True)
class State:
    """Everything the next round depends on: adapter [d], a range per tensor [T], which ring they are good for."""

    round: int  # rounds done, void ones among them
    voids: int
    convicted: tuple[IdentityKey, ...]
    """Dealers who were proved to have spoilt a round, ascending: no cohort holds them any more."""
    adapter: Vector
    ranges: tuple[float, ...]
    narrow: bool
    history: bytes
    """32 bytes that commit to every outcome so far: who signs a state signs all that was published on the way."""

    @property
    def header(self) -> bytes:
        """Everything but the adapter."""
        ranges = np.array(self.ranges, "<f8").tobytes()
        return enc(self.round, self.voids, int(self.narrow), ranges, self.history) + enc_sequence(self.convicted)

    @classmethod
    def decode(cls, header: bytes, adapter: bytes) -> "State":
        """A state from its header and its adapter, float32 little-endian; DecodeError for bytes that are neither."""
        with Reader(header) as reader:
            number, voids, narrow, ranges = reader.integer(), reader.integer(), reader.integer(), reader.bytes()
            history, convicted = reader.bytes(HASH_BYTES), reader.sequence(KEY_BYTES, MAX_COHORT)
        if len(ranges) % 8 or narrow > 1:
            raise DecodeError("not the header of a state")
        if len(adapter) % 4:
            raise DecodeError("adapter ends within a number")
        vector = np.frombuffer(adapter, "<f4").astype(np.float32)
        widths = tuple(float(width) for width in np.frombuffer(ranges, "<f8"))
        return cls(number, voids, tuple(map(IdentityKey, convicted)), vector, widths, bool(narrow), history)

    def to_bytes(self) -> bytes:
        """Header and adapter, for a file."""
        return enc(self.header) + self.adapter.astype("<f4", copy=False).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "State":
        """What `to_bytes` made; DecodeError for anything else."""
        header = Reader(data[:_MOST_HEADER]).bytes()
        return cls.decode(header, data[len(enc(header)) :])

    def hash(self, contract: Contract) -> bytes:
        """32 bytes that differ wherever anything in the state does."""
        return sha256(enc("mpctf-secure/state/v1", contract.schema_hash, self._adapter_hash, self.header))

    def after(self, outcome: bytes) -> "State":
        """With one more outcome in its history: the body of a publication or of a void round."""
        return replace(self, history=extend_history(self.history, outcome))

    @functools.cached_property
    def _adapter_hash(self) -> bytes:
        return hashlib.sha256(self.adapter.astype("<f4", copy=False).data).digest()


def extend_history(history: bytes, outcome: bytes) -> bytes:
    """RECOVERY.md section 2."""
    return sha256(enc("mpctf-secure/outcome/v1", history, outcome))


@dataclass(frozen=True)
class Sum:
    """A published sum: lanes [d], scalars, the cohort its grid was made for, and whose inputs it holds."""

    lanes: Lanes
    scalars: Lanes
    first_cohort: tuple[IdentityKey, ...]
    survivors: tuple[IdentityKey, ...]


def sum_of(context: Context, survivors: tuple[IdentityKey, ...], chunks: Sequence[bytes]) -> Sum:
    """The sum in its chunks, the scalar block last; the caller has checked their sizes."""
    return Sum(*context.layout.join(chunks), context.first_cohort, survivors)


def adapter_chunks(adapter: Vector, first: int = 0) -> Iterator[bytes]:
    """An adapter in pieces of CHUNK_BYTES, from number `first` on."""
    data = adapter.astype("<f4", copy=False).data.cast("B")
    return (bytes(data[at : at + CHUNK_BYTES]) for at in range(first * CHUNK_BYTES, len(data), CHUNK_BYTES))


def initial_state(contract: Contract) -> State:
    """State 0, a function of the contract. No aggregate is published yet, so every range is the clip norm."""
    adapter = initial_adapter(contract.tensors, contract.seed)
    return State(0, 0, (), adapter, _wide_ranges(contract), narrow=False, history=bytes(HASH_BYTES))


def grid(contract: Contract, state: State, cohort_size: int) -> Grid:
    """The quantisation of the next round; the ring follows from state and cohort and is never chosen."""
    bits = NARROW_BITS if state.narrow and cohort_size <= MOST_IN_NARROW_RING else WIDE_BITS
    return Grid(_sizes(contract), state.ranges, bits, cohort_size)


def most_chunks(contract: Contract) -> int:
    """How many chunks a published sum has at the most, in the wide ring."""
    return len(Layout(WIDE_BITS, sum(_sizes(contract)), len(SCALAR_NAMES) + len(contract.tensors)).sizes)


def round_context(contract: Contract, state: State, cohort: tuple[IdentityKey, ...]) -> Context:
    """What attempt 1 of the next round is bound to."""
    lattice = grid(contract, state, len(cohort))
    parameters = (contract.privacy.model_dump_json(), contract.weight_cap, contract.aggregation.model_dump_json())
    return Context(
        run_id=contract.run_id,
        round=state.round + 1,
        attempt=1,
        roster_hash=bytes.fromhex(contract.roster_hash),
        contract_hash=contract.hash,
        base_model_hash=bytes.fromhex(contract.base_model_hash),
        state_hash=state.hash(contract),
        round_parameters_hash=sha256(enc(*parameters) + np.array(state.ranges, "<f8").tobytes()),
        schema_hash=contract.schema_hash,
        ring_bits=lattice.bits,
        dimension=lattice.dimension,
        scalars=len(SCALAR_NAMES) + len(lattice.sizes),
        colluders=contract.colluders,
        cohort=cohort,
        first_cohort=cohort,
    )


@dataclass(frozen=True)
class RoundSummary:
    """The published scalars of a round, in plain units."""

    rows: int
    mean_loss: float
    norm_clipped: int
    coordinates_clipped: float  # share of all


def summarise(total: Sum) -> RoundSummary:
    """Read the scalar block."""
    rows, loss, norm_clipped, *clipped = decode_scalars(total.scalars)
    share = sum(clipped) / (len(total.survivors) * total.lanes.size)
    return RoundSummary(rows, loss / 2**20 / max(rows, 1), norm_clipped, share)


def next_state(contract: Contract, state: State, total: Sum, run: Run = map) -> State:
    """Apply the aggregation strategy to the sum; SecurityError where the sum cannot be an honest one.

    A forged sum inside the bound stays undetected: secure aggregation proves nothing about the sum itself.
    """
    lattice = grid(contract, state, len(total.first_cohort))
    summary = summarise(total)
    most_rows = len(total.survivors) * contract.weight_cap
    if not 0 < summary.rows <= most_rows:
        raise SecurityError(f"published sum counts {summary.rows} rows of {most_rows}", culprits=[COORDINATOR])
    mean = decode_mean(total.lanes, summary.rows, contract.weight_cap, lattice, run)
    _check_norm(contract, lattice, mean, most_rows / summary.rows)
    adapter = fedavg.step(state.adapter, mean, contract.aggregation.server_learning_rate)
    largest = _largest(lattice, mean)
    # A tensor that has not moved yet gives no scale: everything stays wide for another round.
    narrow = summary.coordinates_clipped <= MOST_CLIPPED and min(largest) > 0
    ranges = _next_ranges(largest, contract.privacy.clip_norm) if narrow else _wide_ranges(contract)
    return replace(state, round=state.round + 1, adapter=adapter, ranges=ranges, narrow=narrow)


def void_state(contract: Contract, state: State, convicted: IdentityKey | None) -> State:
    """The next state after a round that could not be finished; ParticipationError for one more than the contract bears.

    The model and its ranges stay; the round number goes on, so the next round takes the next slice of data. A convicted
    dealer enters the state: a coordinator that shows the proof to some only gets two states, and no quorum for either.
    """
    if state.voids == contract.void_rounds:
        raise ParticipationError(f"round {state.round + 1} is void, and the contract bears {state.voids} void rounds")
    out = {*state.convicted, *([convicted] if convicted else [])}
    return replace(state, round=state.round + 1, voids=state.voids + 1, convicted=tuple(sorted(out)))


def _sizes(contract: Contract) -> tuple[int, ...]:
    return tuple(math.prod(shape) for _, shape in contract.tensors)


def _wide_ranges(contract: Contract) -> tuple[float, ...]:
    return (contract.privacy.clip_norm,) * len(contract.tensors)


def _largest(lattice: Grid, mean: Vector) -> list[float]:
    """max|mean| of each tensor [T]. A maximum, unlike a sum or a norm, has the same bits everywhere."""
    largest = [0.0] * len(lattice.sizes)
    for tensor, where in lattice.parts():
        largest[tensor] = max(largest[tensor], float(np.abs(mean[where]).max()))
    return largest


def _next_ranges(largest: list[float], clip_norm: float) -> tuple[float, ...]:
    """2^e just above 8·max|mean| of each tensor, between 2⁻²⁰·C and C."""
    powers = (float(np.ldexp(1.0, int(np.frexp(_HEADROOM * top)[1]))) for top in largest)
    return tuple(min(max(power, _SMALLEST_RANGE * clip_norm), clip_norm) for power in powers)


def _check_norm(contract: Contract, lattice: Grid, mean: Vector, dilution: float) -> None:
    """‖mean‖ ≤ C and the most that stochastic rounding can add: one step a coordinate and participant."""
    norm = math.sqrt(sum(float(np.square(mean[where], dtype=np.float64).sum()) for _, where in lattice.parts()))
    steps = zip(lattice.sizes, lattice.steps, strict=True)
    rounding = dilution * math.sqrt(sum(size * step**2 for size, step in steps))
    if not norm <= (contract.privacy.clip_norm + rounding) * (1 + 1e-6):
        raise SecurityError(f"published mean has norm {norm:.3g}, above the clip norm", culprits=[COORDINATOR])
