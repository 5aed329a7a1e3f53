"""What a run's folder proves to somebody who trusts nobody in it."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from chronicle import COORDINATOR, NOTHING, Chronicle
from samples import make_contract

from mpctf_secure.auditlog.entry import Entry
from mpctf_secure.auditlog.events import AttemptOpened, Leaf, RoundClosed, RunEnded, StepWitnessed, SumPublished, Vetoed
from mpctf_secure.auditlog.history import History
from mpctf_secure.auditlog.note import Checkpoint, Note
from mpctf_secure.auditlog.own_events import Cosigned, LogBegun, RunAccepted
from mpctf_secure.auditlog.storage import Record
from mpctf_secure.auditlog.witness import head
from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import enrollment
from mpctf_secure.identity.documents import RosterBody, SignedRoster
from mpctf_secure.identity.keys import Keys
from mpctf_secure.identity.roster import view
from mpctf_secure.rounds.audit import contradicts, find_fork, missing, reconcile, run_log_key, uncommitted, verify_run
from mpctf_secure.rounds.messages import Certificate, Position

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
MEMBERS = ("a", "b", "c", "d")


def drawn(name: str) -> Keys:
    log = COORDINATOR if name == "coordinator" else SigningKey(sha256(f"{name} log".encode()))
    return Keys(SigningKey(sha256(f"{name} identity".encode())), SigningKey(sha256(f"{name} tls".encode())), log)


KEYS = {name: drawn(name) for name in sorted((*MEMBERS, "coordinator"))}
BODY = enrollment.next_roster(
    None,
    [
        enrollment.make_request(
            keys,
            name,
            "participant" if name in MEMBERS else "coordinator",
            NOW,
            NOW + datetime.timedelta(days=300),
            bytes(32),
            bytes(32),
        )
        for name, keys in KEYS.items()
    ],
)
SIGNED = enrollment.collect(BODY, [enrollment.vote(BODY, keys, KEYS.keys() - {name}) for name, keys in KEYS.items()])
ROSTER = view(BODY)
CONTRACT = make_contract(roster_hash=BODY.hash.hex(), participants=MEMBERS)
LOG_KEY = run_log_key(ROSTER, CONTRACT.run_id)
STATE = sha256(b"state")
POSITION = Position(1, STATE).encode()


def says(log: Chronicle, name: str, step: int, said: bytes, commitment: bytes = bytes(32)) -> bytes:
    """What a member says of a step that it has witnessed."""
    keys, label = KEYS[name], "transition" if step else "accept"
    return log.says(keys.identity, step, said, label, log_key=keys.log, commitment=commitment)


@dataclass
class Run:
    """One round of a run, as its folder has it, but for what a test changes."""

    beyond: Sequence[Leaf] = ()
    """Leaves between the end of round 1 and its checkpoint."""
    unsigned: Sequence[Leaf] = ()
    who: Sequence[str] = ("a", "b", "c")
    """In the certificates."""
    last: Sequence[str] | None = None
    """In the last one, if others."""
    told: tuple[str, ...] | None = None
    """In the log, if others."""
    disagreeing: Sequence[str] = ()
    commitments: Mapping[int, bytes] = field(default_factory=dict)
    """Of d, by step."""

    def record(self) -> Record:
        log = Chronicle(CONTRACT, ROSTER)
        certificates = {0: self.certificate(log, 0, b"{}")}
        witnessed = log.witnessed(0, certificates[0])
        log.tell(
            witnessed if self.told is None else witnessed.model_copy(update={"witnesses": self.told}),
            AttemptOpened(round=1, attempt=1, context=NOTHING, cohort=MEMBERS),
            SumPublished(round=1, attempt=1, tuple=NOTHING, survivors=("a", "b", "c"), recovered=(), digest=NOTHING),
            RoundClosed(round=1, state_hash=STATE.hex()),
            *self.beyond,
        )
        log.sign(1)
        certificates[1] = self.certificate(log, 1, POSITION)
        log.tell(*self.unsigned)
        notes = {f"steps/{step}": note.encode() for step, note in log.notes.items()}
        return Record(log.lines, b"", notes, certificates, CONTRACT.encode(), [SIGNED.encode()])

    def certificate(self, log: Chronicle, step: int, said: bytes) -> bytes:
        other, commitment = Position(1, bytes(32)).encode(), self.commitments.get(step, bytes(32))
        names = sorted(self.last or self.who if step else self.who, key=lambda name: KEYS[name].identity.public)
        bodies = {name: other if step and name in self.disagreeing else said for name in names}
        return log.certificate(step, [says(log, name, step, body, commitment) for name, body in bodies.items()])


def test_honest_folder_says_what_was_signed_and_by_whom() -> None:
    verdict, _ = verify_run(Run(unsigned=[Vetoed(participant="b"), RunEnded(exit_code=0)]).record())
    assert (verdict.leaves, verdict.signed, verdict.witnessed) == (8, 6, 6)
    assert [(step.number, step.size, list(step.witnesses)) for step in verdict.steps] == [
        (0, 2, ["a", "b", "c"]),
        (1, 6, ["a", "b", "c"]),
    ]
    assert (verdict.rounds, verdict.end) == (1, None)  # anybody may have written that it ended
    assert verdict.first_roster == 1


def test_coordinator_and_whoever_holds_another_state_are_no_witnesses() -> None:
    verdict, _ = verify_run(Run(who=("a", "b", "c", "d", "coordinator"), disagreeing=["d"]).record())
    assert list(verdict.steps[1].witnesses) == ["a", "b", "c"]


def contract_of_one() -> Record:
    """A contract that nobody else has seen, beside a log that has none."""
    record, alone = Run().record(), make_contract(roster_hash=BODY.hash.hex(), participants=("d",), colluders=0)
    log = Chronicle(alone, ROSTER)
    certificate = log.certificate(0, [says(log, "d", 0, b"{}")])
    return record._replace(lines=record.lines[:1], notes={}, certificates={0: certificate}, contract=alone.encode())


def with_roster(body: RosterBody) -> Record:
    """A roster that nobody has signed, and a log that names it."""
    record = Run().record()
    line = record.lines[0].replace(BODY.hash.hex().encode(), body.hash.hex().encode())
    rosters = [SignedRoster(roster=body, signatures=()).encode()]
    return record._replace(lines=[line], notes={}, certificates={}, contract=b"", rosters=rosters)


LATER = BODY.model_copy(update={"version": 2, "previous": NOTHING})
LIES: dict[str, tuple[Callable[[], Record], str]] = {
    "the end is below a step": (lambda: Run(beyond=[RunEnded(exit_code=0)]).record(), "does not end with step 1"),
    "witnesses are told who were none": (lambda: Run(told=("a", "b", "d")).record(), "another witnesses"),
    "the coordinator makes up a quorum": (lambda: Run(who=("a", "b", "coordinator")).record(), "2 witnesses hold"),
    "the contract is of one alone": (contract_of_one, "hides contract_closed|another participants"),
    "the roster has no coordinator": (
        lambda: with_roster(LATER.model_copy(update={"members": BODY.members[:2]})),
        "it needs one coordinator",
    ),
}


@pytest.mark.parametrize(("lie", "why"), LIES.values(), ids=LIES.keys())
def test_lie_in_a_folder_is_refused(lie: Callable[[], Record], why: str) -> None:
    with pytest.raises(SecurityError, match=why):
        verify_run(lie())


def test_first_roster_of_a_folder_is_signed_by_nobody_unless_it_is_version_1() -> None:
    verdict, _ = verify_run(with_roster(LATER))
    assert verdict.first_roster == 2


def test_checkpoint_that_only_a_certificate_has_convicts_too() -> None:
    mine, other = Run().record(), Run(who=MEMBERS).record()
    stripped = other._replace(notes={})
    assert contradicts(stripped, verify_run(mine)[1], LOG_KEY) == 6
    assert find_fork(mine, stripped, LOG_KEY)


def test_second_checkpoint_of_a_step_convicts_even_where_it_goes_on_from_the_first() -> None:
    mine, longer = Run().record(), Run(beyond=[Vetoed(participant="b")]).record()
    assert contradicts(mine, verify_run(longer)[1], LOG_KEY) is None
    assert find_fork(mine, longer, LOG_KEY)
    assert find_fork(mine, mine, LOG_KEY) is None


def test_checkpoint_of_somebody_else_contradicts_nothing() -> None:
    """Without the contract no certificate is checked, and anybody can write one."""
    mine = Run().record()
    forged = Note(Checkpoint(LOG_KEY.name, 3, bytes(32)).encode()).signed(LOG_KEY.name, KEYS["a"].log)
    planted = mine._replace(contract=b"", certificates={7: Certificate(forged.encode(), ()).encode()})
    assert contradicts(planted, verify_run(mine)[1], LOG_KEY) is None


def test_certificate_that_may_have_come_since_is_not_missed_and_one_that_was_signed_for_is() -> None:
    later = StepWitnessed(round=1, certificate=NOTHING, witnesses=())
    opened = AttemptOpened(round=2, attempt=1, context=NOTHING, cohort=MEMBERS)
    running = Run(unsigned=[later, opened]).record()
    running = running._replace(certificates={0: running.certificates[0]})
    verdict, history = verify_run(running)
    assert missing(verdict, history, running) == []
    removed = Run().record()._replace(certificates={})
    verdict, history = verify_run(removed)
    assert missing(verdict, history, removed) == ["the certificate of step 0 is missing, and any of a later one"]


def own_log(*, covers: int | None = None) -> tuple[History, bytes]:
    """d's, and the commitment to it that d has signed at step 0, to all leaves or to so many of them."""
    own = History()

    def tell(event: Leaf) -> None:
        own.take(Entry(event, NOW).encode())

    tell(LogBegun(organisation="d", identity=NOTHING, previous=None, size=0, root=None))
    accepted = {"roster_hash": CONTRACT.roster_hash, "contract_hash": CONTRACT.hash.hex(), "policy": NOTHING}
    tell(RunAccepted(run=CONTRACT.run_id, **accepted))
    size = len(own.tree) if covers is None else covers
    commitment = head(bytes(32), size, own.tree.root(size))
    log = Chronicle(CONTRACT, ROSTER)
    seen = {"size": 2, "root": log.history.tree.root().hex(), "own_size": size}
    tell(Cosigned(run=CONTRACT.run_id, round=0, head=commitment.hex(), salt=NOTHING, **seen))
    return own, commitment


def test_site_cannot_commit_to_less_than_it_has_of_the_run() -> None:
    changed = "step 0: this site's own log is not the one that it has committed to: it was changed"
    for covers, doubts in {None: [], 2: [], 1: [changed], 0: [changed]}.items():
        own, commitment = own_log(covers=covers)
        record = Run(who=MEMBERS, commitments={0: commitment}).record()
        record = record._replace(certificates={0: record.certificates[0]})  # of step 1 d's own log here knows nothing
        verdict, history = verify_run(record)
        assert reconcile("d", verdict, history, record, own) == doubts


def test_site_that_takes_itself_out_of_the_certificates_is_not_vouched_for() -> None:
    record = Run(who=MEMBERS).record()
    assert list(uncommitted("d", verify_run(record)[0])) == []
    stripped = Run(who=MEMBERS, last=("a", "b", "c")).record()
    stripped = stripped._replace(certificates={1: stripped.certificates[1]})
    assert list(uncommitted("d", verify_run(stripped)[0])) == [
        "steps 0 to 1: no commitment of this site to its own log is here"
    ]
