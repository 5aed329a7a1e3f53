"""What a run's log, rosters, contract and certificates say together, without trust in who keeps them."""

import bisect
import contextlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

from mpctf_secure.auditlog.events import AttemptFailed, RoundClosed, RunEnded, RunOpened, SumPublished
from mpctf_secure.auditlog.history import History, HistoryOfRun
from mpctf_secure.auditlog.note import Checkpoint, Key, Note
from mpctf_secure.auditlog.own_events import Confirmed, Cosigned, Heard, Joined, Released, RunAccepted, Uploaded
from mpctf_secure.auditlog.storage import Record, check_below, signed_size, take_all
from mpctf_secure.auditlog.witness import check_cosignature, check_step, demand, head, is_fork, origin_of_run
from mpctf_secure.errors import DecodeError, SecurityError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity import enrollment
from mpctf_secure.identity.documents import SignedRoster
from mpctf_secure.identity.roster import Member, Roster, view
from mpctf_secure.ids import IdentityKey
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.rounds.messages import Certificate, Position, Witnessed
from mpctf_secure.secagg.messages import Signed
from mpctf_secure.secagg.parameters import MAX_ATTEMPTS


class Step(NamedTuple):
    """A step that a quorum has witnessed: how many leaves, and when each witness has cosigned them."""

    number: int
    size: int
    witnesses: Mapping[str, int]


class Verdict(NamedTuple):
    """What holds of a run's log."""

    origin: str
    roster: Roster
    contract: Contract | None
    leaves: int
    signed: int
    """So many of them, from the first, are below a checkpoint of the coordinator."""
    steps: tuple[Step, ...]
    rounds: int
    """So many are closed in the signed leaves."""
    end: int | None
    """The run's exit code in them."""
    first_roster: int
    """The version of the first one: if it is not 1, nothing says whether its members had signed it."""

    @property
    def witnessed(self) -> int:
        """So many leaves, from the first, are witnessed."""
        return max((step.size for step in self.steps), default=0)


def log_key(member: Member) -> Key:
    """Under which a member cosigns."""
    return Key(member.name, member.log)


def run_log_key(roster: Roster, run: str) -> Key:
    """Under which the coordinator signs the log of a run."""
    return Key(origin_of_run(roster.coordinator.name, run), roster.coordinator.log)


def read_certificate(
    data: bytes, step: int, contract: Contract, roster: Roster
) -> tuple[Note, dict[IdentityKey, Witnessed]]:
    """A step's checkpoint, and what each of its witnesses has said; SecurityError where anything in it is not signed.

    The caller still owes: are there enough of them, do they say the same, and is this the log's checkpoint?
    """
    certificate = Certificate.decode(data)
    note = Note.decode(certificate.note)
    check_step(note, run_log_key(roster, contract.run_id), step)
    said = {}
    for message in map(Signed.decode, certificate.messages):
        message.verify("transition" if step else "accept", contract.run_context)
        body = Witnessed.decode(message.body)
        check_cosignature(note, log_key(roster.by_identity(message.sender)), body.cosignature)
        said[message.sender] = body
    return note, said


def verify_run(record: Record) -> tuple[Verdict, HistoryOfRun]:
    """What a run's folder proves, and what its log says; SecurityError names what does not hold, and where.

    1. The rosters follow each other, each but the first signed by the one before, version 1 by all; one is the run's.
    2. The leaves are canonical, known, and in an order that a run can have; the contract is the one in the log.
    3. Every checkpoint there is signed by the coordinator, no cosignature is forged, and these leaves lead to it.
    4. Every certificate is of the checkpoint of its step and signed by a quorum, and the next step has its hash.

    The caller still owes: is this the roster that the organisations know?
    """
    history = take_all(record.lines, HistoryOfRun())
    opened = history.event(RunOpened)
    if opened is None:
        raise SecurityError("the log is empty")
    roster, first = _roster_of(record.rosters, opened.roster_hash)
    contract = Contract.decode(record.contract) if record.contract else None
    if contract:
        check_beginning(history, contract, roster)
    key = run_log_key(roster, opened.run)
    signed = signed_size(record, key, history)
    keys = list(map(log_key, roster.participants))
    for note in map(Note.decode, record.notes.values()):
        for witness in keys:
            note.cosigned_at(witness)
    steps = tuple(
        _verified_step(history, number, data, contract, roster)
        for number, data in sorted(record.certificates.items())
        if contract
    )
    signed = max([signed, *(step.size for step in steps)])
    ended = history.event(RunEnded)
    end = ended.exit_code if ended and history.places["run_ended",] < signed else None
    rounds = sum(history.places["round_closed", number] < signed for number in range(1, history.round + 1))
    return Verdict(key.name, roster, contract, len(history.tree), signed, steps, rounds, end, first), history


def _roster_of(documents: Sequence[bytes], roster_hash: str) -> tuple[Roster, int]:
    """That of the run, and the version of the first one there is."""
    history = sorted(map(SignedRoster.decode, documents), key=lambda one: one.roster.version)
    if not history:
        raise SecurityError("no roster beside the log")
    enrollment.verify_form(history[0].roster)
    enrollment.verify_history(history)
    for signed in history:
        if signed.roster.hash.hex() == roster_hash:
            return view(signed.roster), history[0].roster.version
    raise SecurityError("the roster in the log is not beside it")


def _verified_step(history: HistoryOfRun, number: int, data: bytes, contract: Contract, roster: Roster) -> Step:
    try:
        note, said = read_certificate(data, number, contract, roster)
        size = check_below(history, Checkpoint.decode(note.text))
        if not history.stands_at(number, size):
            raise SecurityError(f"its checkpoint does not end with step {number}")
        closed = history.event(RoundClosed, number)
        position = Position(number, bytes.fromhex(closed.state_hash)).encode() if closed else None
        times = {
            str(roster.by_identity(identity).name): body.time
            for identity, body in said.items()
            if position in {None, body.said} and roster.by_identity(identity).name in contract.participants
        }
        if len(times) < contract.agreement:
            raise SecurityError(f"{len(times)} witnesses hold the state, {contract.agreement} are needed")
        if history.find("step_witnessed", number):
            check_witnesses(history, number, data, roster)
    except SecurityError as error:
        raise SecurityError(f"certificate of step {number}: {error.message}", culprits=error.culprits) from error
    return Step(number, size, dict(sorted(times.items())))


def check_witnesses(history: History, step: int, certificate: bytes, roster: Roster) -> None:
    """SecurityError where a run's log tells of another certificate of a step, or of others in it."""
    senders = [Signed.decode(message).sender for message in Certificate.decode(certificate).messages]
    names = tuple(sorted(str(roster.by_identity(sender).name) for sender in senders))
    demand(history, "step_witnessed", step, certificate=sha256(certificate).hex(), witnesses=names)


def check_beginning(history: HistoryOfRun, contract: Contract, roster: Roster) -> None:
    """SecurityError where a run's log does not begin with this contract, its roster and participants.

    `package` is what the coordinator runs, its word; the contract has what the sites run.
    """
    proposed = {"run": contract.run_id, "participants": tuple(contract.participants)}
    demand(history, "run_opened", roster_version=roster.version, roster_hash=contract.roster_hash, **proposed)
    agreed = {"contract_hash": contract.hash.hex(), "base_model_hash": contract.base_model_hash}
    demand(history, "contract_closed", **agreed)


def check_known(history: HistoryOfRun, own: History, run: str, rounds: Iterable[int]) -> None:
    """SecurityError where a run's log hides what a site's own log has of these rounds, or has it otherwise.

    That is: the attempts that it joined and with whom, the tuples that it confirmed, what was published.
    """
    for number in rounds:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            if joined := own.event(Joined, run, number, attempt):
                demand(history, "attempt_opened", number, attempt, context=joined.context, cohort=joined.cohort)
            if confirmed := own.event(Confirmed, run, number, attempt):
                if history.find("attempt_failed", number, attempt):
                    demand(history, "attempt_failed", number, attempt, tuple=confirmed.tuple)
                else:
                    signed = {"tuple": confirmed.tuple, "recovered": confirmed.recovered}
                    demand(history, "sum_published", number, attempt=attempt, **signed)
        heard = own.event(Heard, run, number)
        if heard:
            demand(history, "attempt_opened", number, heard.attempt, cohort=heard.cohort)
        if heard and heard.digest:
            said = {"attempt": heard.attempt, "digest": heard.digest, "survivors": heard.survivors}
            demand(history, "sum_published", number, **said)
        elif heard:
            demand(history, "round_void", number, attempt=heard.attempt, convicted=heard.convicted)


class Fork(NamedTuple):
    """Two checkpoints that convict whoever has signed them, and its key."""

    key: Key
    notes: tuple[Note, Note]

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """From a file of evidence; DecodeError for anything else, SecurityError where it convicts nobody."""
        try:
            content = json.loads(data)
            key, (one, other) = Key.from_vkey(str(content["log"])), (str(note).encode() for note in content["notes"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DecodeError("not a file of evidence", hint="a site writes it as fork.json") from error
        fork = cls(key, (Note.decode(one), Note.decode(other)))
        if not is_fork(*fork.notes, key):
            raise SecurityError("these two checkpoints convict nobody")
        return fork

    def encode(self) -> bytes:
        """The file of evidence."""
        notes = [note.encode().decode() for note in self.notes]
        return json.dumps({"log": self.key.vkey, "notes": notes}, indent=1, ensure_ascii=False).encode()


def find_fork(one: Record, other: Record, key: Key) -> Fork | None:
    """Two checkpoints, one of each record, that convict the log's writer."""
    theirs = defaultdict[int | tuple[str, ...], list[Note]](list)  # no two of another size and step convict
    for note, checkpoint in _checkpoints(other, key):
        theirs[checkpoint.size].append(note)
        theirs[checkpoint.extra].append(note)
    for mine, checkpoint in _checkpoints(one, key):
        for note in theirs[checkpoint.size] + theirs[checkpoint.extra]:
            if note.text != mine.text and is_fork(mine, note, key):
                return Fork(key, (mine, note))
    return None


def _checkpoints(record: Record, key: Key) -> Iterator[tuple[Note, Checkpoint]]:
    """Every one in a record that this log has signed, also those that only a certificate has."""
    certified = (Certificate.decode(data).note for data in record.certificates.values())
    for note in map(Note.decode, [*record.notes.values(), *certified]):
        with contextlib.suppress(SecurityError):
            yield note, note.checkpoint(key)


def contradicts(record: Record, history: HistoryOfRun, key: Key) -> int | None:
    """The size of a checkpoint in one record that another record's leaves do not lead to.

    Both were signed: whoever did that has two histories, whether or not two checkpoints of one step show it at once.
    """
    for _, checkpoint in _checkpoints(record, key):
        if checkpoint.size <= len(history.tree) and history.tree.root(checkpoint.size) != checkpoint.root:
            return checkpoint.size
    return None


def reconcile(name: str, verdict: Verdict, history: HistoryOfRun, record: Record, own: History) -> list[str]:
    """What does not go together in a run's log and the own log of one of its sites, and whose word is whose.

    What it says of the site is signed by the site; survivors are the coordinator's word.
    """
    contract = verdict.contract
    if contract is None:
        return ["the contract is not beside the log"]
    run, member = contract.run_id, next((m for m in verdict.roster.participants if m.name == name), None)
    if member is None:
        return [f"{name} is not in its roster"]
    doubts = []
    of_run = sorted(own.places[key] for key, entry in own.known.items() if getattr(entry.event, "run", None) == run)
    accepted = own.event(RunAccepted, run)
    if accepted is None or accepted.contract_hash != contract.hash.hex():
        doubts.append("this site's own log has not accepted this contract")
    for number in range(1, history.round + 1):
        try:
            check_known(history, own, run, [number])
        except SecurityError as error:
            doubts.append(error.message)
        doubts += _round_doubts(name, number, history, own, run)
    for step in range(contract.rounds + 1):
        cosigned = own.event(Cosigned, run, step)
        if cosigned and len(history.tree) < cosigned.size:
            doubts.append(f"step {step}: this site has cosigned {cosigned.size} leaves")
        elif cosigned and history.tree.root(cosigned.size).hex() != cosigned.root:
            doubts.append(f"step {step}: this site has cosigned another log")
        said = _said(member.identity, step, record)
        if said and (cosigned is None or not _commits(said.head, cosigned, own, of_run)):
            doubts.append(f"step {step}: this site's own log is not the one that it has committed to: it was changed")
    return doubts


def uncommitted(name: str, verdict: Verdict) -> Iterator[str]:
    """At which steps no commitment that a site has signed says what its own log was.

    A site with certificates of its own choice can show any own log: whoever audits it takes the coordinator's.
    """
    compared = {step.number for step in verdict.steps if name in step.witnesses}
    if missed := [step for step in range(verdict.rounds + 1) if step not in compared]:
        spans = itertools.groupby(enumerate(missed), lambda one: one[1] - one[0])
        ends = ([step for _, step in span] for _, span in spans)
        steps = ", ".join(f"{span[0]} to {span[-1]}" if len(span) > 1 else str(span[0]) for span in ends)
        yield f"steps {steps}: no commitment of this site to its own log is here"


def _said(member: IdentityKey, step: int, record: Record) -> Witnessed | None:
    """What a member says in a step's certificate, which was verified."""
    messages = Certificate.decode(record.certificates[step]).messages if step in record.certificates else ()
    mine = (message for message in map(Signed.decode, messages) if message.sender == member)
    return next((Witnessed.decode(message.body) for message in mine), None)


def _round_doubts(name: str, number: int, history: HistoryOfRun, own: History, run: str) -> Iterator[str]:
    released, published = own.event(Released, run, number), history.event(SumPublished, number)
    if released:
        failed = history.event(AttemptFailed, number, released.attempt)
        if released.tuple not in {told.tuple for told in (published, failed) if told}:
            yield f"round {number}: this site released shares for a sum that is not in the log"
    if published and name in published.survivors and not own.event(Uploaded, run, number, published.attempt):
        yield f"round {number}: the coordinator says that this site is in the sum, its own log does not"


def missing(verdict: Verdict, history: HistoryOfRun, record: Record) -> list[str]:
    """Evidence that must lie beside a log that tells of it, and does not."""
    places = (history.places.get(("step_witnessed", number)) for number in range(history.round + 1))
    # Of a log that is being written a certificate may have come since.
    told = [number for number, place in enumerate(places) if place is not None and place < verdict.signed]
    doubts = []
    if history.find("contract_closed") and verdict.contract is None:
        doubts.append("contract.json is missing: no certificate was checked")
    # Who was away has no certificates of the steps that it missed, but always one of a later step.
    if told and max(record.certificates, default=-1) < max(told):
        doubts.append(f"the certificate of step {max(told)} is missing, and any of a later one")
    return doubts


def unwitnessed(history: HistoryOfRun, own: History, run: str) -> int | None:
    """The round for which a site has released shares, and that no step has closed: what became of it is not known."""
    number = history.round + 1
    return number if own.event(Released, run, number) else None


def _commits(commitment: bytes, cosigned: Cosigned, own: History, of_run: Sequence[int]) -> bool:
    """Whether what a site has signed is its own log as it was then, with all that it had of the run.

    `of_run`: the numbers of its leaves of the run. A commitment to fewer would leave the site free to write others.
    """
    cosigning = own.places["cosigned", cosigned.run, cosigned.round]
    before = bisect.bisect_left(of_run, cosigning)
    if not (of_run[before - 1] if before else -1) < cosigned.own_size <= cosigning:
        return False
    return commitment == head(bytes.fromhex(cosigned.salt), cosigned.own_size, own.tree.root(cosigned.own_size))
