"""This site as a witness of the run's log: it keeps a copy, misses nothing that it knows of, and cosigns (AUDIT.md 3).

What it knows is in its own log, where it gets before anything leaves.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from mpctf_secure import files
from mpctf_secure.auditlog.history import HistoryOfRun
from mpctf_secure.auditlog.note import Checkpoint, Note
from mpctf_secure.auditlog.own import OwnLog
from mpctf_secure.auditlog.own_events import Confirmed, Cosigned, Heard, Joined, Released, Uploaded
from mpctf_secure.auditlog.storage import (
    CERTIFICATES,
    FOLDER,
    STEPS,
    Copy,
    check_below,
    keep_beside,
    keep_witnessed,
    take_all,
)
from mpctf_secure.auditlog.witness import check_step, demand, head, is_fork, witnessed
from mpctf_secure.errors import COORDINATOR, SecurityError, blaming
from mpctf_secure.hazmat.kdf import HASH_BYTES, sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity.roster import Roster
from mpctf_secure.ids import IdentityKey
from mpctf_secure.participant.link import Link
from mpctf_secure.rounds.audit import (
    Fork,
    check_beginning,
    check_known,
    check_witnesses,
    log_key,
    read_certificate,
    run_log_key,
)
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.rounds.messages import Announce, LogRequest, Publication, Void, Witnessed
from mpctf_secure.secagg.messages import Survivors
from mpctf_secure.secagg.proof import DealerProof

FORK = "fork.json"
_MOST_PIECES = 128
_STRIDE = 100
"""Steps of a log that is got anew in one answer."""


class ForkError(SecurityError):
    """The coordinator is convicted: what it says after that mends nothing."""


class Certified(NamedTuple):
    """A step's certificate that was checked: its bytes, its checkpoint, and that with all cosignatures."""

    step: int
    data: bytes
    note: Note
    witnessed: Note


class Witness:
    """Of one run; `folder` is the run's. What may not change is what this site's own log says it has cosigned."""

    def __init__(
        self,
        name: str,
        link: Link,
        roster: Roster,
        contract: Contract,
        key: SigningKey,
        own: OwnLog,
        folder: Path,
        rosters: Mapping[str, bytes],
    ) -> None:
        """`key` is this site's log key, `rosters` the files of rosters that whoever reads the copy needs."""
        self._link, self._roster, self._contract, self._key, self._own = link, roster, contract, key, own
        self._name, self._run = name, contract.run_id
        self._log_key = run_log_key(roster, self._run)
        self._folder = folder / FOLDER
        if (self._folder / FORK).exists():
            raise ForkError(
                f"{self._folder / FORK} convicts the coordinator of two histories of this run",
                hint="mpctf-secure audit verify says whom; while that file is there this site takes no part in the run",
                culprits=[COORDINATOR],
            )
        self._copy = Copy(self._folder, HistoryOfRun)
        self._checked = 0  # up to this step the log was held against the own log
        newest = own.cosigned(self._run, contract.rounds)
        self._newest = newest.round if newest else -1
        """The last step that this site has cosigned."""
        keep_beside(self._folder, contract.encode(), rosters)

    def join(self, announce: Announce, context: bytes) -> None:
        """An attempt, before anything of it leaves."""
        cohort = self._names(announce.cohort)
        self._own.append(Joined(**self._which(announce), context=context.hex(), cohort=cohort))

    def upload(self, announce: Announce, digest: bytes) -> None:
        """A masked input, before its last piece leaves."""
        told = digest.hex() if self._contract.secure else None
        self._own.append(Uploaded(**self._which(announce), digest=told))

    def confirm(self, announce: Announce, claim: bytes) -> None:
        """A tuple, before the signature of it leaves."""
        recovered = self._names(Survivors.decode(claim).dropouts)
        self._own.append(Confirmed(**self._which(announce), tuple=sha256(claim).hex(), recovered=recovered))

    def release(self, announce: Announce, claim: bytes) -> None:
        """Shares for a tuple, before they leave."""
        self._own.append(Released(**self._which(announce), tuple=sha256(claim).hex()))

    def hear(self, outcome: Publication | Void) -> None:
        """A round's outcome, before it is applied."""
        announce, digest, survivors, convicted = outcome.announce, None, tuple[str, ...](), None
        if isinstance(outcome, Publication):
            digest, survivors = outcome.digest.hex(), self._names(outcome.survivors)
        elif outcome.proof:
            (convicted,) = self._names([DealerProof.decode(outcome.proof).dealer])
        said = {"digest": digest, "survivors": survivors, "convicted": convicted}
        heard = Heard(**self._which(announce), cohort=self._names(announce.cohort), **said)
        if self._own.history.event(Heard, self._run, announce.round) not in {None, heard}:
            raise SecurityError(f"round {announce.round} has a second, different outcome", culprits=[COORDINATOR])
        self._own.append(heard)

    def witness(self, step: int, said: bytes, state_hash: bytes | None) -> bytes:
        """The body that says `said` and that this site has seen the log of a step; the log is kept before.

        SecurityError for a log that hides something, or is not the one that this site has seen.
        """
        entry = self._own.history.find("cosigned", self._run, step)
        if entry is None and step < self._newest:
            raise SecurityError(f"this site has cosigned step {self._newest}, not {step}", culprits=[COORDINATOR])
        note = self._kept(step, state_hash) or self.follow(step, state_hash)
        checkpoint = Checkpoint.decode(note.text)
        if entry is None:
            tree, salt = self._own.history.tree, os.urandom(HASH_BYTES)
            commitment = head(salt, len(tree), tree.root())
            entry = self._own.append(
                Cosigned(
                    run=self._run,
                    round=step,
                    size=checkpoint.size,
                    root=checkpoint.root.hex(),
                    head=commitment.hex(),
                    salt=salt.hex(),
                    own_size=len(tree),
                )
            )
            self._own.sign(self._key)
            self._newest = step
        assert isinstance(entry.event, Cosigned)  # noqa: S101
        # The time is that of the leaf: after a crash the same bytes are sent again.
        line = note.cosigned(self._name, self._key, int(entry.time.timestamp()))
        return Witnessed(said, line.signature, bytes.fromhex(entry.event.head)).encode()

    def follow(self, step: int, state_hash: bytes | None, certified: Note | None = None) -> Note:
        """Get the log up to a step, check it, and keep it; the step's checkpoint, which has to be the certified one."""
        with blaming(COORDINATOR, "audit log"):
            anew = False
            try:
                note, lines, history = self._fetch(step, self._copy.history)
            except ForkError:
                raise
            except SecurityError:
                if not len(self._copy.history.tree):
                    raise
                anew = True  # the copy is a cache: this machine, and not the coordinator, may have spoilt it
                note, lines, history = self._fetch_anew(step)
            if certified:
                self._check_one_history(step, certified, note)
            self._demand(history, step, state_hash, since=0 if anew else self._checked)
        if anew:
            self._copy.forget()
        self._copy.extend(history, lines)
        files.replace(self._folder / STEPS / str(step), note.encode())
        return note

    def check_certificate(self, step: int, data: bytes, said: bytes | None, voters: Set[IdentityKey]) -> Certified:
        """A certificate, verified.

        SecurityError where fewer than a quorum of `voters` say this, or it is not of the log that I have.
        """
        with blaming(COORDINATOR, "certificate"):
            note, bodies = read_certificate(data, step, self._contract, self._roster)
            self._check_same(step, note)
            agreeing = sum(member in voters and said in {None, body.said} for member, body in bodies.items())
            if agreeing < self._contract.agreement:
                raise SecurityError(f"only {agreeing} participants hold the state after round {step}")
        keys = {member: log_key(self._roster.by_identity(member)) for member in bodies}
        return Certified(step, data, note, witnessed(note, ((keys[m], body.cosignature) for m, body in bodies.items())))

    def keep_certificate(self, certified: Certified) -> None:
        """One that was checked, of a log that is here."""
        files.replace(self._folder / CERTIFICATES / str(certified.step), certified.data)
        keep_witnessed(self._folder, certified.witnessed)

    def _fetch_anew(self, step: int) -> tuple[Note, list[bytes], HistoryOfRun]:
        """A step's checkpoint and all leaves, in answers none of which is too long; the copy stays as it is."""
        lines, history = list[bytes](), HistoryOfRun()
        for number in [*range(_STRIDE, step, _STRIDE), step]:
            note, more, history = self._fetch(number, history)
            lines += more
        return note, lines, history

    def _fetch(self, step: int, before: HistoryOfRun) -> tuple[Note, list[bytes], HistoryOfRun]:
        """A step's checkpoint, the leaves after those before, and the history with them, which goes with the floor."""
        have = len(before.tree)
        raw, content = self._link.log(self._contract.run_context, LogRequest(step, have), _MOST_PIECES)
        note = Note.decode(raw)
        checkpoint = check_step(note, self._log_key, step)
        self._check_same(step, note)
        *lines, rest = content.split(b"\n")
        if rest or have + len(lines) != checkpoint.size:
            raise SecurityError(f"{len(lines)} leaves behind the first {have}, the checkpoint has {checkpoint.size}")
        history = take_all(lines, before.copy())
        if history.tree.root() != checkpoint.root:
            raise SecurityError("its leaves are not those that it has signed, or not those that it has shown before")
        floor = self._own.cosigned(self._run, step)
        if floor and not _goes_on(floor, step, checkpoint, history):
            raise SecurityError(f"it is another one than this site has cosigned at step {floor.round}")
        return note, lines, history

    def _demand(self, history: HistoryOfRun, step: int, state_hash: bytes | None, since: int) -> None:
        """Everything that this site knows of the run by itself is there as it knows it; up to `since` that was seen."""
        check_beginning(history, self._contract, self._roster)
        if not history.stands_at(step, len(history.tree)):
            raise SecurityError(f"its checkpoint does not end with step {step}")
        check_known(history, self._own.history, self._run, range(since + 1, step + 1))
        for number in range(since, step):
            if seen := self._seen(number):
                check_below(history, Checkpoint.decode(seen.text))
            before = self._folder / CERTIFICATES / str(number)
            if before.exists():
                check_witnesses(history, number, before.read_bytes(), self._roster)
        if state_hash:
            demand(history, "round_closed", step, state_hash=state_hash.hex())
        self._checked = step

    def _check_same(self, step: int, note: Note) -> None:
        """The coordinator signs one checkpoint a step, and this site may have seen it."""
        if seen := self._seen(step):
            self._check_one_history(step, seen, note)

    def _seen(self, step: int) -> Note | None:
        """The checkpoint of a step that is here; None also where this machine has spoilt it."""
        path = self._folder / STEPS / str(step)
        with contextlib.suppress(FileNotFoundError, SecurityError):
            note = Note.decode(path.read_bytes())
            check_step(note, self._log_key, step)
            return note
        return None

    def _kept(self, step: int, state_hash: bytes | None) -> Note | None:
        """The checkpoint of a step that this site has cosigned, if it and its leaves are still here."""
        cosigned, note = self._own.history.event(Cosigned, self._run, step), self._seen(step)
        history = self._copy.history
        if cosigned is None or note is None or len(history.tree) < cosigned.size:
            return None
        root = history.tree.root(cosigned.size)
        if (root.hex(), Checkpoint.decode(note.text).root) != (cosigned.root, root):
            return None
        if state_hash:
            with blaming(COORDINATOR, "audit log"):
                demand(history, "round_closed", step, state_hash=state_hash.hex())
        return note

    def _check_one_history(self, step: int, seen: Note, note: Note) -> None:
        """Two checkpoints of a step convict the coordinator, and are kept for whoever is to judge that."""
        if seen.text == note.text:
            return
        if not is_fork(seen, note, self._log_key):
            raise SecurityError(f"another checkpoint of step {step}")
        files.replace(self._folder / FORK, Fork(self._log_key, (seen, note)).encode())
        raise ForkError(
            f"the coordinator has signed two histories at step {step}",
            hint=f"{self._folder / FORK} convicts it before anybody: mpctf-secure audit verify",
        )

    def _which(self, announce: Announce) -> dict[str, Any]:
        return {"run": self._run, "round": announce.round, "attempt": announce.attempt}

    def _names(self, members: Iterable[IdentityKey]) -> tuple[str, ...]:
        return tuple(sorted(str(self._roster.by_identity(member).name) for member in members))


def _goes_on(floor: Cosigned, step: int, checkpoint: Checkpoint, history: HistoryOfRun) -> bool:
    """Whether a checkpoint continues what was cosigned, and is the same of the same step, whatever was lost here."""
    if checkpoint.size < floor.size or (floor.round == step and checkpoint.size != floor.size):
        return False
    return history.tree.root(floor.size) == bytes.fromhex(floor.root)
