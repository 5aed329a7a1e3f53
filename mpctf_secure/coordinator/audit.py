"""The run's log at the coordinator: AUDIT.md. What is told of a run goes through here first."""

import datetime
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpctf_secure import __version__, files
from mpctf_secure.attestation.hardening import read_back
from mpctf_secure.attestation.measurement import measure_package
from mpctf_secure.auditlog.events import RunEnded, RunOpened, leaf_of
from mpctf_secure.auditlog.history import HistoryOfRun
from mpctf_secure.auditlog.note import Checkpoint, Note
from mpctf_secure.auditlog.storage import CERTIFICATES, FOLDER, STEPS, Log, keep_beside, keep_witnessed
from mpctf_secure.auditlog.witness import check_cosignature, step_line, witnessed
from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity.roster import Roster
from mpctf_secure.ids import IdentityKey
from mpctf_secure.monitoring.events import Record
from mpctf_secure.rounds.audit import log_key, run_log_key
from mpctf_secure.rounds.contract import Proposal
from mpctf_secure.rounds.messages import Certificate, LogRequest, Witnessed
from mpctf_secure.secagg.messages import Signed

_PIECE_BYTES = 1 << 19


class RunLog:
    """The log of one run, in the run's folder."""

    def __init__(self, folder: Path, roster: Roster, run_id: str, now: Callable[[], datetime.datetime]) -> None:
        """Open, or begin; SecurityError for one that was changed."""
        self._roster = roster
        self._folder = folder / FOLDER
        self._log = Log(self._folder, run_log_key(roster, run_id), HistoryOfRun(), now)
        keep_beside(self._folder, b"", {})

    def begin(self, record: Record, proposal: Proposal) -> None:
        """Tell which program runs this, under which protection, whenever a process begins; and first, what is begun."""
        package = measure_package().hex()
        if self.is_empty:
            record(
                "run_opened",
                run=proposal.run_id,
                roster_version=self._roster.version,
                roster_hash=proposal.roster_hash,
                package=package,
                participants=proposal.participants,
            )
        protections = [one.name for one in read_back() if one.in_force]
        record("process_started", version=__version__, package=package, protections=protections)

    def recording(self, record: Record) -> Record:
        """Puts what is told, and is for the log, on disk there before `record` gets it; not after the run's end, nor
        where the run never began."""

        def told(kind: str, **fields: Any) -> None:
            """One event."""
            leaf = leaf_of(kind, fields)
            if leaf and self.ended is None and (not self.is_empty or isinstance(leaf, RunOpened)):
                self._log.append(leaf)
            record(kind, **fields)

        return told

    def keep(self, contract: bytes, rosters: Mapping[str, bytes]) -> None:
        """What a reader of the log needs beside it."""
        keep_beside(self._folder, contract, rosters)

    def checkpoint(self, step: int, key: SigningKey) -> Note:
        """The one of a step, which covers everything so far when it is asked for first."""
        path = self._folder / STEPS / str(step)
        if not path.exists():
            with files.writing(path):
                files.replace(path, self._log.sign(key, step_line(step)).encode())
        return self._asked(step)

    @property
    def ended(self) -> int | None:
        """The exit code with which the run has ended, as the log says; None where it has not."""
        event = self._log.history.event(RunEnded)
        return event.exit_code if event else None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was told yet."""
        return not len(self._log.history.tree)

    def close(self, key: SigningKey) -> Checkpoint:
        """The run has ended: one more checkpoint, which nobody cosigns."""
        return Checkpoint.decode(self._log.sign(key).text)

    def pieces(self, request: LogRequest) -> tuple[bytes, Iterator[bytes]]:
        """A step's checkpoint, and the leaves below it from some number on, each with its end."""
        note = self._asked(request.step)
        size = Checkpoint.decode(note.text).size
        if request.size > size:
            raise SecurityError(
                f"the log has {size} leaves at step {request.step}, and a witness has {request.size}",
                hint="the coordinator's operator has to restore the run's folder as it was",
            )
        content = b"".join(line + b"\n" for line in self._log.leaves(request.size, size))
        starts = range(request.held * _PIECE_BYTES, len(content), _PIECE_BYTES)
        return note.encode(), (content[at : at + _PIECE_BYTES] for at in starts)

    def check(self, step: int, sender: IdentityKey, said: Witnessed) -> None:
        """SecurityError where a message is not of a witness of this step's checkpoint."""
        check_cosignature(self._asked(step), log_key(self._roster.by_identity(sender)), said.cosignature)

    def certify(self, step: int, messages: list[bytes]) -> tuple[bytes, list[str]]:
        """Keep the certificate of a step, of the messages that were checked: its bytes, and who is in it."""
        note = self._asked(step)
        # By sender: after a restart they may come in another order, and the certificate has to be the same.
        signed = sorted(map(Signed.decode, messages), key=lambda message: message.sender)
        certificate = Certificate(note.encode(), tuple(message.encode() for message in signed)).encode()
        members = [self._roster.by_identity(one.sender) for one in signed]
        cosignatures = (Witnessed.decode(one.body).cosignature for one in signed)
        cosigned = witnessed(note, zip(map(log_key, members), cosignatures, strict=True))
        with files.writing(self._folder):
            files.replace(self._folder / CERTIFICATES / str(step), certificate)
        keep_witnessed(self._folder, cosigned)
        return certificate, sorted(str(member.name) for member in members)

    def _asked(self, step: int) -> Note:
        """The checkpoint of a step that was signed."""
        path = self._folder / STEPS / str(step)
        if not path.exists():
            raise SecurityError(f"the log of step {step} is not due")
        return Note.decode(path.read_bytes())
