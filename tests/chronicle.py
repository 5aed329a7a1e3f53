"""The log of a run as an honest coordinator would write it, made at once, for tests in which it then lies."""

import datetime
from collections.abc import Iterable, Sequence

from mpctf_secure.auditlog.entry import Entry
from mpctf_secure.auditlog.events import (
    AttemptFailed,
    AttemptOpened,
    ContractClosed,
    Leaf,
    RoundClosed,
    RoundVoid,
    RunOpened,
    StepWitnessed,
    SumPublished,
)
from mpctf_secure.auditlog.history import HistoryOfRun
from mpctf_secure.auditlog.note import Checkpoint, Key, Note
from mpctf_secure.auditlog.witness import origin_of_run, step_line
from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity.roster import Member, Roster
from mpctf_secure.ids import IdentityKey, ParticipantName
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.rounds.messages import Certificate, Publication, Void, Witnessed
from mpctf_secure.secagg.messages import Signed

COORDINATOR = SigningKey(bytes([99]) * 32)
BEGAN = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
NOTHING = "00" * 32


def make_roster(names: Iterable[str], keys: Iterable[SigningKey]) -> Roster:
    """Members whose log key is their identity key, and a coordinator."""
    pairs = [(name, key, "participant") for name, key in zip(names, keys, strict=True)]
    members = (
        Member(ParticipantName(name), role, IdentityKey(key.public), key.public)  # type: ignore[arg-type]
        for name, key, role in [*pairs, ("coordinator", COORDINATOR, "coordinator")]
    )
    return Roster(1, bytes(32), BEGAN + datetime.timedelta(days=30), tuple(members))


class Chronicle:
    """Leaves and checkpoints of one run."""

    def __init__(self, contract: Contract, roster: Roster) -> None:
        self.roster, self.contract = roster, contract
        self.key = Key(origin_of_run("coordinator", contract.run_id), COORDINATOR.public)
        self.history = HistoryOfRun()
        self.lines: list[bytes] = []
        self.notes: dict[int, Note] = {}
        self.tell(
            RunOpened(
                run=contract.run_id,
                roster_version=1,
                roster_hash=contract.roster_hash,
                package=contract.package,
                participants=contract.participants,
            ),
            ContractClosed(contract_hash=contract.hash.hex(), base_model_hash=contract.base_model_hash),
        )
        self.sign(0)

    def tell(self, *events: Leaf) -> None:
        """Leaves, a second apart."""
        for event in events:
            entry = Entry(event, BEGAN + datetime.timedelta(seconds=len(self.lines)))
            self.lines.append(entry.encode())
            self.history.take(self.lines[-1])

    def tell_round(self, number: int, outcome: bytes, state_hash: bytes, certificate: bytes | None = None) -> None:
        """A round with this outcome: attempts of contexts and tuples that nobody knows."""
        self.tell(self.witnessed(number - 1, certificate))
        said = decoded(outcome)
        last = said.announce.attempt
        for attempt in range(1, last + 1):
            which = {"round": number, "attempt": attempt}
            self.tell(AttemptOpened(**which, context=NOTHING, cohort=self.names(said.announce.cohort)))
            if attempt < last or isinstance(said, Void):
                self.tell(AttemptFailed(**which, tuple=None))
        which = {"round": number, "attempt": last}
        if isinstance(said, Void):
            self.tell(RoundVoid(**which, convicted=None))
        else:
            names = self.names(said.survivors)
            digest = said.digest.hex()
            self.tell(SumPublished(**which, tuple=NOTHING, survivors=names, recovered=(), digest=digest))
        self.tell(RoundClosed(round=number, state_hash=state_hash.hex()))

    def witnessed(self, step: int, certificate: bytes | None) -> StepWitnessed:
        """What tells of a certificate; None: of one that nobody knows."""
        if certificate is None:
            return StepWitnessed(round=step, certificate=NOTHING, witnesses=())
        senders = [Signed.decode(message).sender for message in Certificate.decode(certificate).messages]
        return StepWitnessed(round=step, certificate=sha256(certificate).hex(), witnesses=self.names(senders))

    def names(self, members: Sequence[IdentityKey]) -> tuple[str, ...]:
        return tuple(sorted(str(self.roster.by_identity(member).name) for member in members))

    def sign(self, step: int) -> Note:
        """The checkpoint of a step, of all leaves so far."""
        self.notes[step] = self.note(step)
        return self.notes[step]

    def note(self, step: int) -> Note:
        tree = self.history.tree
        text = Checkpoint(self.key.name, len(tree), tree.root(), (step_line(step),)).encode()
        return Note(text).signed(self.key.name, COORDINATOR)

    def log(self, step: int, size: int) -> tuple[bytes, bytes]:
        """What a coordinator answers to a witness that has so many leaves."""
        note = self.notes[step]
        end = Checkpoint.decode(note.text).size
        if size > end:
            raise SecurityError(f"the log has {end} leaves")
        return note.encode(), b"".join(line + b"\n" for line in self.lines[size:end])

    def says(
        self,
        key: SigningKey,
        step: int,
        said: bytes,
        label: str = "transition",
        note: Note | None = None,
        log_key: SigningKey | None = None,
        commitment: bytes = bytes(32),
    ) -> bytes:
        """What one member says of a step that it has witnessed; without `log_key` its log key is its identity key."""
        name = next((str(m.name) for m in self.roster.members if m.identity == key.public), "stranger")
        cosignature = (note or self.notes[step]).cosigned(name, log_key or key, 1_893_456_000).signature
        body = Witnessed(said, cosignature, commitment).encode()
        return Signed.make(label, self.contract.run_context, key, body).encode()

    def certificate(self, step: int, messages: Iterable[bytes]) -> bytes:
        return Certificate(self.notes[step].encode(), tuple(messages)).encode()


def decoded(outcome: bytes) -> Publication | Void:
    try:
        return Publication.decode(outcome)
    except SecurityError:
        return Void.decode(outcome)
