"""A participant against a coordinator that publishes another sum, cohort or state than it showed before."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from chronicle import Chronicle, make_roster
from samples import make_contract

from mpctf_secure.aggregation.bias import PROJECTIONS
from mpctf_secure.aggregation.lora import initial_adapter
from mpctf_secure.auditlog.events import Vetoed
from mpctf_secure.auditlog.own import OwnLog
from mpctf_secure.config.strategies import MemoryAware
from mpctf_secure.config.training import Choice, Training
from mpctf_secure.errors import DecodeError, ParticipationError, SecurityError, UsageError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import keystore
from mpctf_secure.ids import IdentityKey
from mpctf_secure.participant import rounds as rounds_module
from mpctf_secure.participant.contribution import projected
from mpctf_secure.participant.link import CaughtUp, Outcome, Published
from mpctf_secure.participant.rounds import Participant
from mpctf_secure.participant.store import Store, Terms
from mpctf_secure.participant.witness import Witness
from mpctf_secure.quorum import default_colluders, default_quorum
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import (
    PROGRESS_PARTS,
    Announce,
    Fetch,
    LogRequest,
    Position,
    Progress,
    Publication,
    Void,
)
from mpctf_secure.rounds.outcome import void_state
from mpctf_secure.rounds.state import State, initial_state
from mpctf_secure.rounds.terms import scalar_count
from mpctf_secure.secagg.chunks import Layout
from mpctf_secure.secagg.codec import encode_scalars
from mpctf_secure.secagg.parameters import threshold
from mpctf_secure.secagg.proof import DealerProof
from mpctf_secure.training.launch.job import HeldOut, Trained
from mpctf_secure.transport.tls import utc_now

KEYS = sorted((SigningKey(bytes([i]) * 32) for i in range(1, 5)), key=lambda key: key.public)
MEMBERS = tuple(IdentityKey(key.public) for key in KEYS)
STRANGERS = tuple(IdentityKey(SigningKey(bytes([i]) * 32).public) for i in range(5, 9))
CONTRACT = make_contract()
MEMORY = 1024
SURVEY = make_contract(data=MemoryAware())
STATE = initial_state(CONTRACT)
SIZES = Layout(32, 600, 3 + PROJECTIONS + 2).sizes
FIRST = Announce(1, 1, MEMBERS, MEMBERS)
ROSTER = make_roster(CONTRACT.participants, KEYS)


class Coordinator:
    """A link whose other end answers what the test wants."""

    def __init__(self, outcome: Outcome | None = None, answer: bytes = b"") -> None:
        self.outcome, self.answer = outcome, answer
        self.caught: CaughtUp | None = None
        self.chronicle: Chronicle = HONEST
        self.asked: list[str] = []
        self.told: list[tuple[str, str]] = []

    def fetch(self, ctx: bytes, request: Fetch, most_chunks: int) -> Outcome | None:
        return self.outcome

    def ask(self, label: str, ctx: bytes, body: bytes, expect: str, *, skippable: bool = False) -> bytes:
        self.asked.append(label)
        if label == "veto":
            self.told.append((label, body.decode()))
        return self.answer

    def tell(self, label: str, ctx: bytes, body: bytes) -> None:
        self.told.append((label, body.decode()))

    def catch_up(self, ctx: bytes, position: Position, most: int) -> CaughtUp | None:
        return self.caught

    def tell_away(self, said: "Away") -> None:
        self.caught, self.chronicle = CaughtUp(*said[:3]), said.log

    def log(self, ctx: bytes, request: LogRequest, most_pieces: int) -> tuple[bytes, bytes]:
        return self.chronicle.log(request.step, request.size)


@dataclass
class Seen:
    """What the coordinator showed of the round's attempts, as `Attempts` keeps it."""

    announce: Announce | None = FIRST
    confirmed: tuple[IdentityKey, ...] | None = MEMBERS[:3]
    released: bool = False


@dataclass
class Roster:
    """Who is in the run, as `Members` has it; `removed` are called `names` in roster version 2."""

    removed: frozenset[IdentityKey] = frozenset()
    names: tuple[str, ...] = ()
    version: int = 2
    identities = frozenset(MEMBERS)

    def left(self) -> set[IdentityKey]:
        return set(self.identities - self.removed)

    def gone(self) -> list[str]:
        return list(self.names)

    def newest_roster(self) -> "Roster":
        return self


class Job:
    """A training job with a given outcome."""

    rows, memory = 10, 2048  # other memory than when the contract was accepted

    def __init__(self, adapter: np.ndarray, loss: float = 1.0, held_out: HeldOut | None = None) -> None:
        self.outcome = Trained(adapter, loss, 10, 100, 1.0, held_out)

    def train(
        self, adapter: np.ndarray, rows: list[int], names: list[str], progress: Callable[[int, int], None]
    ) -> Trained:
        return self.outcome

    def check_finite(self, trained: Trained) -> None:
        """What clipping refuses too."""


def participant(
    folder: Path,
    link: Coordinator | None = None,
    job: Job | None = None,
    roster: Roster | None = None,
    contract: Contract = CONTRACT,
) -> Participant:
    keys = folder / "keys"
    keys.mkdir(mode=0o700, parents=True)
    store = Store(folder / "work")
    terms = Terms(data_hash="00" * 32, choice=Choice(), memory=MEMORY)
    store.accept(contract, terms)
    lonely: Any = link or Coordinator()
    members: Any = roster or Roster()
    site: Any = job or Job(initial_adapter(contract.tensors, 1))
    silent: Any = lambda *_, **__: None  # noqa: E731
    own = OwnLog(keys, "a", MEMBERS[0], KEYS[0].public, utc_now)
    witness = Witness("a", lonely, ROSTER, contract, KEYS[0], own, store.folder(contract.run_id), {})
    return Participant("a", lonely, KEYS[0], contract, site, members, keys, store, silent, terms, silent, witness)


def announce(attempt: int = 1, cohort: tuple[IdentityKey, ...] = MEMBERS, first: Any = None) -> Announce:
    return Announce(1, attempt, cohort, cohort if first is None else first)


def publication(said: Announce = FIRST, survivors: tuple[IdentityKey, ...] = MEMBERS[:3]) -> Publication:
    return Publication(said, survivors, sha256(b""))


LIES = {
    "a cohort of strangers": (publication(announce(cohort=tuple(sorted(STRANGERS)))), SIZES),
    "a cohort below the quorum": (publication(announce(cohort=MEMBERS[:2]), MEMBERS[:2]), SIZES),
    "an empty cohort": (publication(announce(cohort=()), ()), SIZES),
    "no survivors": (publication(survivors=()), SIZES),
    "survivors below the floor": (publication(survivors=MEMBERS[:2]), SIZES),
    "a survivor twice": (publication(survivors=(*MEMBERS[:3], MEMBERS[2])), SIZES),
    "one survivor three times": (publication(survivors=(MEMBERS[0],) * 3), SIZES),
    "another cohort than was announced": (publication(announce(cohort=MEMBERS[:3])), SIZES),
    "other survivors than were signed": (publication(survivors=MEMBERS), SIZES),
    "attempt 0": (publication(announce(0)), SIZES),
    "an attempt that no cohort allows": (publication(announce(4)), SIZES),
    "two cohorts in attempt 1": (publication(announce(1, MEMBERS[:3], MEMBERS)), SIZES),
    "a later attempt of another first cohort": (publication(announce(2, MEMBERS[:3])), SIZES),
    "a vector of another size": (publication(), [SIZES[0] - 4, SIZES[1]]),
}


@pytest.mark.parametrize(("header", "sizes"), LIES.values(), ids=LIES.keys())
def test_publication_that_does_not_fit_what_was_shown_is_refused(
    tmp_path: Path, header: Publication, sizes: list[int]
) -> None:
    site = participant(tmp_path)
    honest = Published(publication(), [bytes(size) for size in SIZES])
    assert site._verified_sum(STATE, Seen(), honest).survivors == MEMBERS[:3]
    with pytest.raises(SecurityError) as caught:
        site._verified_sum(STATE, Seen(), Published(header, [bytes(size) for size in sizes]))
    assert caught.value.culprits == ("coordinator",)


def test_sum_of_a_later_attempt_is_taken_only_by_who_released_in_none_before(tmp_path: Path) -> None:
    """Else the coordinator would open two attempts and publish the one that it likes."""
    site = participant(tmp_path)
    later = Published(publication(announce(2, MEMBERS[:3], MEMBERS)), [bytes(size) for size in SIZES])
    assert site._verified_sum(STATE, Seen(), later).survivors == MEMBERS[:3]
    with pytest.raises(SecurityError, match="another attempt"):
        site._verified_sum(STATE, Seen(released=True), later)
    earlier = Published(publication(), [bytes(size) for size in SIZES])
    with pytest.raises(SecurityError, match="another attempt"):
        site._verified_sum(STATE, Seen(later.header.announce, None), earlier)


def test_void_round_keeps_the_model_and_counts(tmp_path: Path) -> None:
    site, state = participant(tmp_path), STATE
    for number in (1, 2):
        following = site._accept_void(state, Void(Announce(number, 1, MEMBERS, MEMBERS), "no luck", b""))
        assert (following.round, following.voids) == (number, number)
        assert np.array_equal(following.adapter, state.adapter)
        assert following.hash(CONTRACT) != state.hash(CONTRACT)
        state = following
    with pytest.raises(ParticipationError, match="bears 2 void rounds"):
        site._accept_void(state, Void(Announce(3, 1, MEMBERS, MEMBERS), "no luck", b""))


def test_void_with_a_proof_that_proves_nothing_is_refused(tmp_path: Path) -> None:
    """Else the coordinator could exclude whom it likes."""
    site = participant(tmp_path)
    for proof in (b"no proof", DealerProof(b"\0\0\0\0", b"", "self-mask", (), ()).encode()):
        with pytest.raises(SecurityError) as caught:
            site._accept_void(STATE, Void(FIRST, "blame", proof))
        assert caught.value.culprits in {("coordinator",), ()}
    assert site._members.left() == set(MEMBERS)


class Untouched:
    """Attempts of a round that nobody must join."""

    announce = None


def test_site_joins_no_attempt_with_a_removed_member_says_why_and_stays_in_the_run(tmp_path: Path) -> None:
    """The coordinator may hear of the removal a moment later: what it announced before that is no attack."""
    link, removed = Coordinator(outcome=Void(FIRST, "no luck", b"")), Roster(frozenset(MEMBERS[3:]), ("telecom-c",))
    site = participant(tmp_path, link, roster=removed)
    attempts: Any = Untouched()
    site._take_part(STATE, None, attempts, FIRST)
    assert link.told == [("veto", "attempt 1 of round 1 with telecom-c, not in roster version 2")]
    assert site._apply(STATE, attempts, cast(Outcome, link.outcome)).voids == 1
    with pytest.raises(SecurityError, match="not in the contract"):
        site._take_part(STATE, None, attempts, announce(cohort=tuple(sorted(STRANGERS))))  # that is one
    with pytest.raises(AttributeError):
        site._take_part(STATE, None, attempts, announce(cohort=MEMBERS[:3]))  # joins


def test_state_that_a_member_signed_before_it_was_removed_stays_agreed(tmp_path: Path) -> None:
    """A quorum is one of the contract's members: it is at worst one of those who may collude. Else who has the newer
    roster a moment earlier would leave the run, and accuse the coordinator."""
    signed = HONEST.certificate(1, (transition(key, MINE) for key in KEYS[1:]))
    after = participant(tmp_path, Coordinator(answer=signed), roster=Roster(frozenset(MEMBERS[3:])))
    after._agree(AFTER)


def void(number: int, reason: str = "no luck") -> bytes:
    return Void(Announce(number, 1, MEMBERS, MEMBERS), reason, b"").encode()


def chronicle(outcomes: list[bytes], state: State, last: bytes) -> Chronicle:
    """The log of rounds with these outcomes, the last with this state."""
    made = Chronicle(CONTRACT, ROSTER)
    for number, outcome in enumerate(outcomes, 1):
        made.tell_round(number, outcome, last if number == state.round else bytes(32))
        made.sign(number)
    return made


def transition(
    key: SigningKey, state_hash: bytes, label: str = "transition", number: int = 1, log: Chronicle | None = None
) -> bytes:
    return (log or HONEST).says(key, number, Position(number, state_hash).encode(), label)


AFTER = void_state(CONTRACT, STATE, None).after(void(1))
MINE = AFTER.hash(CONTRACT)
HONEST = chronicle([void(1)], AFTER, MINE)
OTHER = chronicle([void(1)], AFTER, MINE)
OTHER.tell(Vetoed(participant="b"))
DISAGREEMENTS = {
    "too few hold my state": [transition(key, MINE) for key in KEYS[:2]],
    "half hold another one": [transition(key, MINE if i < 2 else sha256(b"other")) for i, key in enumerate(KEYS)],
    "one says it three times": [transition(KEYS[1], MINE)] * 3,
    "strangers hold it": [transition(SigningKey(bytes([i]) * 32), MINE) for i in range(5, 9)],
    "they signed something else": [transition(key, MINE, "ready") for key in KEYS],
    "nobody says anything": [],
    "they have witnessed another log": [
        HONEST.says(key, 1, Position(1, MINE).encode(), note=OTHER.note(1)) for key in KEYS
    ],
}


@pytest.mark.parametrize("said", DISAGREEMENTS.values(), ids=DISAGREEMENTS.keys())
def test_state_that_fewer_than_t_hold_is_refused(tmp_path: Path, said: list[bytes]) -> None:
    """Two sums published to two groups in the last round would otherwise give two final models."""
    honest = HONEST.certificate(1, (transition(key, MINE) for key in KEYS[:3]))
    assert CONTRACT.agreement == 3
    link = Coordinator(answer=honest)
    site = participant(tmp_path, link)
    site._agree(AFTER)
    link.answer = HONEST.certificate(1, said)
    with pytest.raises(SecurityError) as caught:
        site._agree(AFTER)
    assert caught.value.culprits == ("coordinator",)


class Away(NamedTuple):
    """What a coordinator says to one who was away, and the log that it shows."""

    state: State
    outcomes: list[bytes]
    certificate: bytes
    log: Chronicle


def away(
    outcomes: list[bytes], state: State | None = None, signers: int = 3, logged: list[bytes] | None = None
) -> Away:
    """What one who was away in the first round or two is given, signed by so many."""
    if state is None:
        state = STATE
        for outcome in outcomes:
            state = void_state(CONTRACT, state, None).after(outcome)
    position = state.hash(CONTRACT), "transition", state.round
    log = chronicle(BOTH if logged is None else logged, state, position[0])
    log.notes.setdefault(state.round, log.notes[0])
    certificate = log.certificate(state.round, (transition(key, *position, log) for key in KEYS[:signers]))
    return Away(state, outcomes, certificate, log)


def vetoed(log: Chronicle) -> Chronicle:
    """The same with one leaf more, signed for the same step."""
    log.tell(Vetoed(participant="b"))
    log.sign(2)
    return log


BOTH = [void(1), void(2)]
LATER = away(BOTH).state
FALSE_STATES = {
    "signed by too few": away(BOTH, signers=2),
    "with another past than it has": away([void(1), void(2, "another sum")], LATER),
    "with a round left out": away(BOTH[1:], LATER),
    "with a round too many": away([*BOTH, void(3)], LATER),
    "with no past at all": away([], LATER),
    "with another adapter than was signed": away(BOTH)._replace(state=replace(LATER, adapter=LATER.adapter + 1)),
    "with an adapter of another model": away(BOTH, replace(LATER, adapter=LATER.adapter[1:])),
    "with fewer void rounds": away(BOTH)._replace(state=replace(LATER, voids=0)),
    "with another log than was witnessed": away(BOTH)._replace(log=vetoed(away(BOTH).log)),
    "with a log that tells of another attempt": away(
        BOTH, logged=[void(1), Void(Announce(2, 2, MEMBERS, MEMBERS), "no luck", b"").encode()]
    ),
}


@pytest.mark.parametrize("lie", FALSE_STATES.values(), ids=FALSE_STATES.keys())
def test_state_for_one_who_was_away_is_refused(tmp_path: Path, lie: Away) -> None:
    link = Coordinator()
    site = participant(tmp_path / "lied-to", link)
    link.tell_away(lie)
    with pytest.raises(SecurityError) as caught:
        site._catch_up(STATE)
    assert caught.value.culprits == ("coordinator",)
    site = participant(tmp_path / "told", link)
    link.tell_away(away(BOTH))
    assert site._catch_up(STATE).hash(CONTRACT) == LATER.hash(CONTRACT)


def test_who_released_for_one_sum_does_not_catch_up_with_another(tmp_path: Path, monkeypatch) -> None:
    """The coordinator opened two sums to two groups, and cut this one off before it could see the other.

    It would otherwise go on with the others' state, and the coordinator have both sums.
    """
    link = Coordinator()
    site = participant(tmp_path, link)
    keystore.note_joined(tmp_path / "keys", CONTRACT.run_id, 1)
    seen = Seen(released=True)
    seen.close = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(site, "_attempts", lambda _: seen)
    for theirs, refused in ((MEMBERS, True), (MEMBERS[:3], False)):
        outcomes = [publication(survivors=theirs).encode(), void(2)]
        link.tell_away(away(outcomes, logged=outcomes))
        if refused:
            with pytest.raises(SecurityError, match="of other survivors"):
                site._catch_up(STATE)
        else:
            assert site._catch_up(STATE).round == 2


SUMS = {
    "of all": (70, 70 * MEMORY, True),
    "with fewer rows than mine and one of each other": (11, 70 * MEMORY, False),
    "in which memory counts less than mine": (70, 10 * MEMORY, False),
}


@pytest.mark.parametrize(("rows", "products", "honest"), SUMS.values(), ids=SUMS.keys())
def test_sum_of_sizes_that_cannot_hold_mine_is_refused(tmp_path: Path, rows: int, products: int, honest: bool) -> None:
    """It would make this site train on all its rows in every round."""
    site = participant(tmp_path, contract=SURVEY)
    published = Published(publication(), [np.array([rows, products], "<u8").tobytes()])
    apply = partial(site._apply, initial_state(SURVEY), cast(Any, Seen()))
    if honest:
        assert apply(published).survey == (rows, products)
    else:
        with pytest.raises(SecurityError, match="less than this site's own"):
            apply(published)


def test_site_that_has_opened_a_sum_of_sizes_adds_up_no_second_one(tmp_path: Path) -> None:
    """With one site less the second would show that one's rows and memory, to the last digit."""
    site = participant(tmp_path, contract=SURVEY)
    said = Void.decode(void(1))
    apply = partial(site._apply, initial_state(SURVEY), outcome=said)
    assert apply(cast(Any, Seen())).round == 1
    for seen in (Seen(released=True), None):  # None: what it had done is lost
        with pytest.raises(ParticipationError, match="adds none up again"):
            apply(cast(Any, seen))


def test_site_that_has_opened_a_sum_of_sizes_does_not_catch_up_past_its_being_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else "you are behind", with the others' certificate, would lead it to the second one."""
    site = participant(tmp_path, contract=SURVEY)
    keystore.note_joined(site._keys, SURVEY.run_id, 1)
    monkeypatch.setattr(site, "_attempts", lambda _: Seen())
    assert site._own_part(initial_state(SURVEY), void(1))
    monkeypatch.setattr(site, "_attempts", lambda _: Seen(released=True))
    with pytest.raises(ParticipationError, match="adds none up again"):
        site._own_part(initial_state(SURVEY), void(1))


def test_projections_of_an_adapter_that_diverges_end_no_run() -> None:
    adapter = np.full_like(STATE.adapter, 1e12)
    scalars = projected(CONTRACT, adapter, STATE.adapter, 1.0)
    encode_scalars(scalars, len(MEMBERS))
    assert max(map(abs, scalars)) > 2**50


@pytest.mark.parametrize("loss", [1e30, np.inf])
def test_base_model_that_is_lost_on_held_out_rows_ends_no_run(tmp_path: Path, loss: float) -> None:
    contract = make_contract(training=Training(validation=0.2))
    state = initial_state(contract)
    job = Job(state.adapter + np.float32(0.01), held_out=HeldOut(loss, 1.0, 2))
    scalars = participant(tmp_path, job=job, contract=contract)._train(state, bytes(32)).scalars
    assert scalars[3] > 2**50
    clip_counters = [0] * len(contract.tensors)
    assert len(scalars) + len(clip_counters) == scalar_count(contract, state)


def test_progress_is_told_in_parts_that_say_nothing_of_the_number_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds_module, "_PROGRESS_SECONDS", -1.0)
    told = []
    for steps in (7, 20, 100, 1000):
        link = Coordinator()
        progress = participant(tmp_path / str(steps), link)._progress(1)
        for step in range(1, steps + 1):
            progress(step, steps)
        told.append([Progress.decode(body.encode()).done for _, body in link.told])
    assert told == [[PROGRESS_PARTS]] * 2 + [list(range(1, PROGRESS_PARTS + 1))] * 2


@pytest.mark.parametrize(("value", "loss"), [(np.nan, 1.0), (np.inf, 1.0), (0.1, 1e30)])
def test_failed_training_shows_before_this_site_is_counted_in_a_cohort(
    tmp_path: Path, value: float, loss: float
) -> None:
    adapter = initial_adapter(CONTRACT.tensors, 1) + np.float32(value)
    link = Coordinator()
    with pytest.raises(UsageError):
        participant(tmp_path, link, Job(adapter, loss)).run()
    assert link.asked == []


def test_two_cohorts_of_one_round_never_both_agree() -> None:
    """Five members, one lies: {h1, h2} and {h3, h4} are shown cohorts of four, so t = 3, and x signs with both."""
    contract = make_contract(participants=("a", "b", "c", "d", "e"), quorum=4)
    assert threshold(4, 1) == 3
    assert contract.agreement == 4
    for members in range(3, 101):
        colluders = default_colluders(members)
        assert 2 * default_quorum(members, colluders) > members + colluders


NAMES = {
    "a path": "../identity",
    "an absolute path": "/etc/x",
    "a zero byte": "a\0b",
    "too long": "a" * 300,
    "empty": "",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_run_id_that_would_be_a_path_is_refused(name: str) -> None:
    """It names files in the keystore: ../identity would be read as a run's secret, and unlinked at its end."""
    proposal = make_contract().model_dump(mode="json", include=set(Proposal.model_fields))
    with pytest.raises(DecodeError):
        Proposal.decode(json.dumps({**proposal, "run_id": name}).encode())
    assert Proposal.decode(json.dumps(proposal).encode()).run_id == "run-1"
