"""What contract and state say of the next round: whether it trains, on how many rows, what travels, and how."""

import math
from itertools import compress

import numpy as np

from mpctf_secure.aggregation.bias import PROJECTIONS
from mpctf_secure.aggregation.lora import moving
from mpctf_secure.config.privacy import Adaptive, ByParticipants, NoNoise
from mpctf_secure.config.strategies import Data, FixedSize, MaxVolume, MemoryAware, Percentage
from mpctf_secure.errors import UsageError
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.ids import IdentityKey
from mpctf_secure.partition import volumes
from mpctf_secure.privacy.integers import BITS, Scheme, joint_noise
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.state import State, Survey, chunks_of
from mpctf_secure.secagg.chunks import Layout
from mpctf_secure.secagg.codec import SCALAR_NAMES, Grid
from mpctf_secure.secagg.parameters import Context, floor

NARROW_BITS, WIDE_BITS = 16, 32
MOST_IN_NARROW_RING = 16


def is_survey(contract: Contract, state: State) -> bool:
    """Whether the next round only adds up sizes: `memory_aware` before it knows them."""
    return isinstance(contract.data, MemoryAware) and state.survey is None


def turn(contract: Contract, state: State) -> int:
    """The number, from 1, of the next round among those that train: it chooses the slice, also after a void one."""
    return state.round + 1 - (contract.rounds - contract.training_rounds)


def volume(contract: Contract, state: State, rows: int, memory: int) -> int:
    """On how many rows a participant with so many, and so many MiB of memory, trains in the next round."""
    match contract.data:
        case FixedSize() | Percentage() as data:
            return own_volume(data, rows)
        case MaxVolume():
            return volumes.max_volume(contract.largest_size, contract.training_rounds)
        case MemoryAware():
            return volumes.memory_aware(rows, memory, *_surveyed(state), contract.training_rounds)


def own_volume(data: Data, rows: int) -> int:
    """The same where it takes nobody else's sizes; ValueError elsewhere."""
    match data:
        case FixedSize(size=size):
            return volumes.fixed_size(size, rows)
        case Percentage(share=share):
            return volumes.percentage(share, rows)
        case _:
            raise ValueError("this volume depends on other participants")


def weight_cap(contract: Contract, state: State) -> int:
    """w_max: the rows above which a participant weighs no more in the next round; 0 where nothing is weighed."""
    match contract.data:
        case FixedSize(size=size):
            return size
        case Percentage(weight_cap=cap):
            return cap
        case MaxVolume():
            return volumes.max_volume(contract.largest_size, contract.training_rounds)
        case MemoryAware(weight_cap=cap):
            return min(cap, -(-_surveyed(state).rows // contract.training_rounds)) if state.survey else 0


def _surveyed(state: State) -> Survey:
    if state.survey is None:
        raise ValueError("sizes are not known before they are added up")
    return state.survey


def moving_tensors(contract: Contract, state: State) -> tuple[bool, ...]:
    """For each tensor of the schema whether it is trained and travels in the next round."""
    if is_survey(contract, state):
        return (False,) * len(contract.tensors)
    trained = state.round - state.voids - (state.survey is not None)
    return moving(contract.tensors, contract.aggregation.lora, trained + 1)


def grid(contract: Contract, state: State, cohort_size: int) -> Grid:
    """The quantisation of the next round; the ring follows from state and cohort and is never chosen.

    A tensor of which nothing is known yet, as its range says, needs the wide ring.
    """
    which = moving_tensors(contract, state)
    ranges = tuple(compress(state.ranges, which))
    known = all(width < contract.privacy.clip_norm for width in ranges)
    bits = NARROW_BITS if ranges and known and cohort_size <= MOST_IN_NARROW_RING else WIDE_BITS
    sizes = tuple(math.prod(shape) for _, shape in compress(contract.tensors, which))
    return Grid(sizes, ranges, bits, cohort_size)


def noise_scheme(contract: Proposal, clip_norm: float, cohort_size: int) -> Scheme | None:
    """How updates of a round become integers with noise; None where there is no noise."""
    privacy = contract.privacy
    if isinstance(privacy, NoNoise):
        return None
    noise, indicators = privacy.noise_multiplier, None
    if isinstance(privacy, Adaptive):
        indicators = max(len(contract.participants) / 20, noise)  # above z/2, so that there is a joint noise
        noise = joint_noise(noise, indicators)
    shares = 1
    if isinstance(privacy, ByParticipants):
        shares = hidden_shares(contract, fewest_survivors(contract, cohort_size))
    return Scheme(cohort_size, shares, noise, indicators, clip_norm)


def check_noise(proposal: Proposal) -> None:
    """UsageError for noise of which nothing is proved, and for terms that tell what noise should hide."""
    if proposal.privacy.holds_against_coordinator and not proposal.secure:
        raise UsageError(
            f"secagg.secure: without masks the coordinator sees each share of the noise of privacy.strategy "
            f"{proposal.privacy.strategy} by itself",
            hint="secure: true, or server_fixed or server_adaptive",
        )
    for cohort_size in (proposal.quorum, len(proposal.participants)):
        if scheme := noise_scheme(proposal, proposal.privacy.clip_norm, cohort_size):
            scheme.check()
    if isinstance(proposal.privacy, NoNoise) and not proposal.privacy.record_dpsgd:
        return
    if not isinstance(proposal.data, FixedSize | Percentage):
        raise UsageError(
            f"data.strategy: {proposal.data.strategy} tells sizes, which privacy is to hide",
            hint="fixed_size or percentage",
        )
    if proposal.privacy.record_dpsgd and proposal.training.validation:
        raise UsageError(
            "training.validation: held-out losses tell of records, and privacy.record_dpsgd is to hide them",
            hint="validation: 0",
        )


def hidden_shares(contract: Proposal, survivors: int) -> int:
    """How many shares of noise in a sum nobody knows: less those of who may collude; of a pair each knows its own."""
    return survivors - max(contract.colluders, 1)


def fewest_survivors(contract: Proposal, cohort_size: int) -> int:
    """With fewer of a cohort than these nothing is opened: L."""
    least = floor(cohort_size, contract.colluders)
    if isinstance(contract.privacy, ByParticipants) and contract.privacy.dropouts is not None:
        least = max(least, cohort_size - contract.privacy.dropouts)
    return least


def scalar_count(contract: Contract, state: State) -> int:
    """Lanes of the scalar block: the survey's, the indicator's of a private round, or the round's."""
    if is_survey(contract, state):
        return len(Survey._fields)
    if not isinstance(contract.privacy, NoNoise):
        return 1
    return len(SCALAR_NAMES) + measures(contract) + projections(contract) + sum(moving_tensors(contract, state))


def measures(contract: Contract) -> bool:
    """Whether a sum tells how well the adapter does on held-out rows.

    None tells how many these are: it never changes, so that two sums with other survivors would show a site's number.
    """
    return contract.training.validation > 0


def projections(contract: Contract) -> int:
    """How many projections of the product B·A a round adds up: where both factors are averaged, to see the bias."""
    return PROJECTIONS if contract.aggregation.lora == "both" else 0


def most_sum_chunks(contract: Contract) -> int:
    """How many chunks a published sum has at the most, in the wide ring."""
    dimension = sum(math.prod(shape) for _, shape in contract.tensors)
    scalars = len(SCALAR_NAMES) + measures(contract) + projections(contract) + len(contract.tensors)
    return len(Layout(WIDE_BITS, dimension, scalars).sizes)


def state_chunks(state: State) -> int:
    """How many pieces the vectors of a state have."""
    return len(state.vectors) * chunks_of(state.adapter.size)


def round_context(contract: Contract, state: State, cohort: tuple[IdentityKey, ...]) -> Context:
    """What attempt 1 of the next round is bound to."""
    lattice = grid(contract, state, len(cohort))
    private = not isinstance(contract.privacy, NoNoise)
    terms = (contract.privacy.model_dump_json(), contract.aggregation.model_dump_json(), weight_cap(contract, state))
    moves = bytes(moving_tensors(contract, state))
    return Context(
        run_id=contract.run_id,
        round=state.round + 1,
        attempt=1,
        roster_hash=bytes.fromhex(contract.roster_hash),
        contract_hash=contract.hash,
        base_model_hash=bytes.fromhex(contract.base_model_hash),
        state_hash=state.hash(contract),
        round_parameters_hash=sha256(enc(*terms, moves) + np.array([state.clip_norm, *state.ranges], "<f8").tobytes()),
        schema_hash=contract.schema_hash,
        ring_bits=BITS if private else lattice.bits,
        dimension=lattice.dimension,
        scalars=scalar_count(contract, state),
        colluders=contract.colluders,
        cohort=cohort,
        first_cohort=cohort,
        least=fewest_survivors(contract, len(cohort)),
        secure=contract.secure,
    )
