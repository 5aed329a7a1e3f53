"""What both ends derive before a message flows: thresholds, floors and the context that binds every message."""

from dataclasses import dataclass

from mpctf_secure.errors import SecurityError, UsageError
from mpctf_secure.hazmat.encoding import enc, enc_sequence
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.ids import IdentityKey

PROTOCOL = "mpctf-secure/secagg/v1"
MAX_COHORT = 100
PAIR = 2
SMALLEST_GROUP = 3


def default_colluders(members: int) -> int:
    """How many members may collude with a malicious coordinator unless the contract says otherwise."""
    return 0 if members <= PAIR else min(max(1, (members - 1) // 3), members - 2)


def threshold(cohort_size: int, colluders: int) -> int:
    """t = ⌊(n + c)/2⌋ + 1. As 2t > n + c, two different survivor sets can never both be opened."""
    return (cohort_size + colluders) // 2 + 1


def default_quorum(members: int, colluders: int) -> int:
    """⌊(N + c)/2⌋ + 1 of the contract's N participants."""
    return (members + colluders) // 2 + 1


def floor(cohort_size: int, colluders: int) -> int:
    """Fewer members than this and no participant goes on: the sum would show too much to c colluders.

    c = 0 is the pair, whose members see each other's update anyway; policies allow it for no larger run.
    """
    t = threshold(cohort_size, colluders)
    return t if colluders == 0 else max(t, colluders + 2, SMALLEST_GROUP)


def check_cohort_size(size: int, members: int, colluders: int, *, quorum: int, allow_pair: bool) -> None:
    """Refuse a cohort (attempt 1's) that could never end well; UsageError says which bound it breaks."""
    if size == PAIR and not allow_pair:
        raise UsageError(
            "two participants learn each other's update by subtracting their own from the sum",
            hint="enrol a third one, or set secagg.allow_pair: true if both accept that",
        )
    smallest = PAIR if allow_pair and members == PAIR else max(colluders + 2, SMALLEST_GROUP)
    if not max(smallest, quorum) <= size <= min(members, MAX_COHORT):
        raise UsageError(
            f"a cohort of {size} is outside [{max(smallest, quorum)}, {min(members, MAX_COHORT)}]",
            hint=f"it must hold quorum ({quorum}), colluders + 2 ({colluders + 2}) and at most {MAX_COHORT} members",
        )


@dataclass(frozen=True)
class Context:
    """Everything an attempt depends on. A lie about any field gives another digest, so no signature verifies."""

    run_id: str
    round: int
    attempt: int
    roster_hash: bytes
    contract_hash: bytes
    base_model_hash: bytes
    state_hash: bytes
    round_parameters_hash: bytes
    schema_hash: bytes
    ring_bits: int
    dimension: int
    scalars: int
    colluders: int
    cohort: tuple[IdentityKey, ...]
    first_cohort: tuple[IdentityKey, ...]

    def __post_init__(self) -> None:
        for group in (self.cohort, self.first_cohort):
            if list(group) != sorted(set(group)):
                raise SecurityError("cohort is not in strictly ascending order of identity keys")
        if not set(self.cohort) <= set(self.first_cohort):
            raise SecurityError("cohort of a later attempt holds somebody whom attempt 1 did not")

    @property
    def threshold(self) -> int:
        """t of attempt 1, which later attempts keep."""
        return threshold(len(self.first_cohort), self.colluders)

    @property
    def floor(self) -> int:
        """The smallest U1, U2 and U3 under which an honest participant goes on."""
        return floor(len(self.first_cohort), self.colluders)

    def x_coordinate(self, member: IdentityKey) -> int:
        """Where the member's Shamir shares lie: 1 + its index in the sorted cohort of attempt 1."""
        return 1 + self.first_cohort.index(member)

    def digest(self) -> bytes:
        """ctx: 32 bytes that enter every signature, key and box of the attempt."""
        return sha256(
            enc(
                PROTOCOL,
                self.run_id,
                self.round,
                self.attempt,
                self.roster_hash,
                self.contract_hash,
                self.base_model_hash,
                self.state_hash,
                self.round_parameters_hash,
                self.schema_hash,
                self.ring_bits,
                self.dimension,
                self.scalars,
                self.colluders,
                self.threshold,
            )
            + enc_sequence(self.cohort)
            + enc_sequence(self.first_cohort)
        )
