"""A participant against a coordinator that publishes another sum, cohort or state than it showed before."""

from collections.abc import Callable

import numpy as np
import pytest
from samples import make_contract

from mpctf_secure.aggregation.lora import initial_adapter
from mpctf_secure.errors import SecurityError, UsageError
from mpctf_secure.hazmat.encoding import enc_sequence
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.ids import IdentityKey
from mpctf_secure.participant.rounds import Participant, Seen
from mpctf_secure.rounds.messages import Position, Publication
from mpctf_secure.rounds.state import Sum, initial_state
from mpctf_secure.secagg.masks import chunk_sizes
from mpctf_secure.secagg.messages import Signed
from mpctf_secure.training.launch import Trained

KEYS = sorted((SigningKey(bytes([i]) * 32) for i in range(1, 5)), key=lambda key: key.public)
MEMBERS = tuple(IdentityKey(key.public) for key in KEYS)
STRANGERS = tuple(IdentityKey(SigningKey(bytes([i]) * 32).public) for i in range(5, 9))
CONTRACT = make_contract()
STATE = initial_state(CONTRACT)
SIZES = chunk_sizes(32, 600, 3 + 2)
HONEST = Publication(1, MEMBERS, MEMBERS[:3], sha256(b""))


class Coordinator:
    """A link whose other end answers what the test wants."""

    def __init__(self, publication: Publication = HONEST, sizes: list[int] = SIZES, answer: bytes = b"") -> None:
        self.publication, self.sizes, self.answer = publication, sizes, answer
        self.asked: list[str] = []

    def fetch_sum(self, ctx: bytes, position: Position, most_chunks: int) -> tuple[Publication, list[bytes]]:
        return self.publication, [bytes(size) for size in self.sizes]

    def ask(self, label: str, ctx: bytes, body: bytes, expect: str, *, skippable: bool = False) -> bytes:
        self.asked.append(label)
        return self.answer

    def tell(self, label: str, ctx: bytes, body: bytes) -> None:
        pass


class Job:
    """A training job with a given outcome."""

    rows = 10

    def __init__(self, adapter: np.ndarray, loss: float = 1.0) -> None:
        self.outcome = Trained(adapter, loss, 10, 100, 1.0)

    def train(self, adapter: np.ndarray, rows: list[int], progress: Callable[[int, int], None]) -> Trained:
        return self.outcome


def participant(link: Coordinator, job: Job | None = None) -> Participant:
    return Participant("a", link, KEYS[0], CONTRACT, job, set(MEMBERS), lambda _: None)  # type: ignore[arg-type]


def header(**changes: object) -> Publication:
    return Publication(**{**vars(HONEST), **changes})


LIES = {
    "a cohort of strangers": (header(cohort=tuple(sorted(STRANGERS))), SIZES),
    "a cohort below the quorum": (header(cohort=MEMBERS[:2], survivors=MEMBERS[:2]), SIZES),
    "an empty cohort": (header(cohort=(), survivors=()), SIZES),
    "no survivors": (header(survivors=()), SIZES),
    "survivors below the floor": (header(survivors=MEMBERS[:2]), SIZES),
    "a survivor who is not in the cohort": (header(cohort=MEMBERS[:3], survivors=MEMBERS[1:]), SIZES),
    "another cohort than was announced": (header(cohort=MEMBERS[:3]), SIZES),
    "other survivors than were signed": (header(survivors=MEMBERS), SIZES),
    "a vector of another size": (HONEST, [SIZES[0] - 4, SIZES[1]]),
}


@pytest.mark.parametrize(("publication", "sizes"), LIES.values(), ids=LIES.keys())
def test_publication_that_does_not_fit_what_was_shown_is_refused(publication: Publication, sizes: list[int]) -> None:
    seen = Seen(MEMBERS, MEMBERS[:3])
    assert participant(Coordinator())._fetch(STATE, seen).survivors == MEMBERS[:3]
    with pytest.raises(SecurityError) as caught:
        participant(Coordinator(publication, sizes))._fetch(STATE, seen)
    assert caught.value.culprits == ("coordinator",)


def transition(key: SigningKey, state_hash: bytes, label: str = "transition") -> bytes:
    return Signed.make(label, CONTRACT.run_context, key, Position(STATE.round, state_hash).encode()).encode()


MINE = STATE.hash(CONTRACT)
TOTAL = Sum(np.zeros(600, "<u4"), np.zeros(5, "<u8"), MEMBERS, MEMBERS)
DISAGREEMENTS = {
    "too few hold my state": [transition(key, MINE) for key in KEYS[:2]],
    "half hold another one": [transition(key, MINE if i < 2 else sha256(b"other")) for i, key in enumerate(KEYS)],
    "one says it three times": [transition(KEYS[1], MINE)] * 3,
    "strangers hold it": [transition(SigningKey(bytes([i]) * 32), MINE) for i in range(5, 9)],
    "they signed something else": [transition(key, MINE, "ready") for key in KEYS],
    "nobody says anything": [],
}


@pytest.mark.parametrize("said", DISAGREEMENTS.values(), ids=DISAGREEMENTS.keys())
def test_state_that_fewer_than_t_hold_is_refused(said: list[bytes]) -> None:
    """Two sums published to two groups in the last round would otherwise give two final models."""
    honest = enc_sequence(transition(key, MINE) for key in KEYS[:3])
    participant(Coordinator(answer=honest))._agree(STATE, TOTAL)
    with pytest.raises(SecurityError):
        participant(Coordinator(answer=enc_sequence(said)))._agree(STATE, TOTAL)


@pytest.mark.parametrize(("value", "loss"), [(np.nan, 1.0), (np.inf, 1.0), (0.1, float("nan"))])
def test_failed_training_shows_before_this_site_is_counted_in_a_cohort(value: float, loss: float) -> None:
    adapter = initial_adapter(CONTRACT.tensors, 1) + np.float32(value)
    link = Coordinator()
    with pytest.raises(UsageError):
        participant(link, Job(adapter, loss)).run()
    assert link.asked == []
