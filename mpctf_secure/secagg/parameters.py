"""What both ends derive before a message flows: thresholds, floors and the context that binds every message."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from mpctf_secure.errors import ParticipationError, SecurityError, UsageError
from mpctf_secure.hazmat.encoding import enc, enc_sequence
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.ids import IdentityKey
from mpctf_secure.quorum import PAIR, default_colluders, default_quorum
from mpctf_secure.secagg.chunks import Layout

PROTOCOL = "mpctf-secure/secagg/v1"
MAX_COHORT = 100
SMALLEST_GROUP = 3
MAX_ATTEMPTS = 3
"""Tries at one round; an attempt that opens nothing shows nothing, but none goes on for ever."""


def threshold(cohort_size: int, colluders: int) -> int:
    """t = ⌊(n + c)/2⌋ + 1. As 2t > n + c, two different survivor sets can never both be opened."""
    return default_quorum(cohort_size, colluders)


def floor(cohort_size: int, colluders: int) -> int:
    """Fewer members than this and no participant goes on: the sum would show too much to c colluders.

    c = 0 is the pair, whose members see each other's update anyway.
    """
    t = threshold(cohort_size, colluders)
    return max(t, PAIR) if colluders == 0 else max(t, colluders + 2, SMALLEST_GROUP)


def check_terms(members: int, *, colluders: int, quorum: int, allow_pair: bool) -> None:
    """Refuse a run whose terms are weaker than the protocol's; UsageError names the term.

    Coordinator and sites both call this: a coordinator that may choose c or the quorum could choose a threshold at
    which two survivor sets open, or a cohort of one.
    """
    if members == PAIR and not allow_pair:
        raise UsageError(
            "two participants learn each other's update by subtracting their own from the sum",
            hint="enrol a third one, or set secagg.allow_pair: true if both accept that",
        )
    least_c, most_c = (0, 0) if members == PAIR else (default_colluders(members), members - 2)
    least_quorum = max(default_quorum(members, colluders), min(members, SMALLEST_GROUP))
    for name, value, least, most in (
        ("participants", members, PAIR, MAX_COHORT),
        ("secagg.colluders", colluders, least_c, most_c),
        ("quorum", quorum, least_quorum, members),
    ):
        if not least <= value <= most:
            raise UsageError(
                f"{name}: {value} is outside [{least}, {most}] for {members} participants",
                hint="leave quorum and secagg.colluders out, and they follow from the number of participants",
            )


def check_cohort(cohort_size: int, members: int, *, colluders: int, quorum: int) -> None:
    """Refuse a cohort (attempt 1's) below the contract's quorum or that could never end well."""
    least = max(quorum, floor(cohort_size, colluders))
    if not least <= cohort_size <= members:
        raise ParticipationError(f"a cohort of {cohort_size} of {members} participants is below {least}")


def check_ascending(group: Sequence[bytes], name: str) -> None:
    """A set has one order, so that equal sets have equal encodings and nobody is in it twice."""
    if list(group) != sorted(set(group)):
        raise SecurityError(f"{name} is not in strictly ascending order of identity keys")


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
    least: int = 0
    """Survivors that the contract asks for besides; with its hash it is in the digest."""
    secure: bool = True
    """Whether there are masks; the same."""

    def __post_init__(self) -> None:
        for group in (self.cohort, self.first_cohort):
            check_ascending(group, "cohort")
        if not set(self.cohort) <= set(self.first_cohort):
            raise SecurityError("cohort holds somebody whom attempt 1 did not")
        if self.attempt == 1 and self.cohort != self.first_cohort:
            raise SecurityError("attempt 1 has two cohorts")
        # A cohort of one would sum nothing but its own input.
        if not PAIR <= self.floor <= len(self.cohort):
            raise SecurityError(f"a cohort of {len(self.cohort)} is below the floor of {self.floor}")

    @property
    def threshold(self) -> int:
        """t of attempt 1, which later attempts keep."""
        return threshold(len(self.first_cohort), self.colluders)

    @property
    def floor(self) -> int:
        """The smallest U1, U2 and U3 under which an honest participant goes on."""
        return max(floor(len(self.first_cohort), self.colluders), self.least)

    @property
    def layout(self) -> Layout:
        """How inputs of this attempt are cut for travel."""
        return Layout(self.ring_bits, self.dimension, self.scalars)

    def retry(self, attempt: int, cohort: tuple[IdentityKey, ...]) -> Self:
        """The context of a later attempt of the round; SecurityError for one that is not allowed to follow this one.

        n, t, c, x-coordinates, ring and input stay those of attempt 1, so that with one release per participant and
        round two attempts never both open; keys and masks are fresh.
        """
        if not self.attempt < attempt <= MAX_ATTEMPTS:
            raise SecurityError(f"attempt {attempt} cannot follow attempt {self.attempt}")
        if not set(cohort) <= set(self.cohort):
            raise SecurityError("cohort of a later attempt holds somebody whom the one before did not")
        return replace(self, attempt=attempt, cohort=cohort)

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
