"""A coordinator that lies in its audit log, in real runs: sites catch it, and can prove a fork."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e.harness import Outcome, RealRun, miss_share_keys

from mpctf_secure.auditlog.events import Banned, Vetoed
from mpctf_secure.auditlog.note import Note
from mpctf_secure.auditlog.storage import CHECKPOINT, FOLDER, LOG
from mpctf_secure.coordinator import reception
from mpctf_secure.coordinator.audit import RunLog
from mpctf_secure.coordinator.reception import Reception
from mpctf_secure.errors import MpctfError, SecurityError
from mpctf_secure.identity.roster import Member
from mpctf_secure.ids import IdentityKey
from mpctf_secure.rounds.messages import LogRequest, Witnessed
from mpctf_secure.secagg.messages import Signed

SETTINGS = ["timeouts.training=60", "timeouts.stage=4"]
SITES = ("site-1", "site-2", "site-3", "site-4")


@pytest.fixture(autouse=True)
def _no_long_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has found a lie is gone, and not waited for."""
    monkeypatch.setattr(reception, "_PRESENT_SECONDS", 1.0)


def run_to_its_end(made: RealRun) -> Outcome | None:
    """A lie may leave the coordinator without a quorum."""
    try:
        return made.run()
    except MpctfError:
        return None


def copy_of(made: RealRun, name: str) -> Path:
    return made.folder / "sites" / name / "work" / "runs" / "real-run" / "audit"


def test_log_is_the_same_everywhere_and_witnessed_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RealRun(tmp_path, ["rounds=2", *SETTINGS], monkeypatch, training=False)
    made.run()
    assert made.failures == {}
    log = (tmp_path / FOLDER / LOG).read_bytes().splitlines()
    kinds = [json.loads(line)["kind"] for line in log]
    of_a_round = ["step_witnessed", "attempt_opened", "sum_published", "round_closed"]
    assert kinds == ["run_opened", "process_started", "contract_closed", *of_a_round, *of_a_round, "step_witnessed"]
    for name in SITES:
        assert (copy_of(made, name) / LOG).read_bytes().splitlines() == log[:-1]
        assert Note.decode((copy_of(made, name) / "witnessed").read_bytes()).lines == (
            Note.decode((tmp_path / FOLDER / "witnessed").read_bytes()).lines
        )


class Forking:
    """From step `step` on, site-4 is shown a log in which site-2 was banned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        self.step, self.asking, self.twin = step, "", None
        checkpoint, pieces, check, certify = RunLog.checkpoint, RunLog.pieces, RunLog.check, RunLog.certify
        check_sender = Reception._check_sender

        def fork_first(log: RunLog, step: int, key: Any) -> Note:
            if step == self.step and self.twin is None:
                folder = log._folder.with_name("twin")
                shutil.copytree(log._folder, folder / FOLDER)
                self.twin = RunLog(folder, log._roster, "real-run", log._log._now)
                self.twin._log.append(Banned(participant="site-2"))
                checkpoint(self.twin, step, key)
            return checkpoint(log, step, key)

        def show(log: RunLog, request: LogRequest) -> Any:
            twin = self.twin if self.asking == "site-4" and request.step >= self.step else None
            return pieces(twin or log, request)

        def note_who(reception: Reception, peer: Member, *rest: Any) -> None:
            self.asking = str(peer.name)
            check_sender(reception, peer, *rest)

        def believe(log: RunLog, step: int, sender: IdentityKey, said: Witnessed) -> None:
            if log._roster.by_identity(sender).name != "site-4" or step < self.step:
                check(log, step, sender, said)

        def leave_out(log: RunLog, step: int, messages: list[bytes]) -> Any:
            of_site_4 = next(member.identity for member in log._roster.members if member.name == "site-4")
            fit = [m for m in messages if step < self.step or Signed.decode(m).sender != of_site_4]
            return certify(log, step, fit)

        monkeypatch.setattr(RunLog, "checkpoint", fork_first)
        monkeypatch.setattr(RunLog, "pieces", show)
        monkeypatch.setattr(RunLog, "check", believe)
        monkeypatch.setattr(RunLog, "certify", leave_out)
        monkeypatch.setattr(Reception, "_check_sender", note_who)


def test_fork_is_caught_by_the_site_that_was_shown_the_other_log_and_it_can_prove_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Forking(monkeypatch, step=1)
    made = RealRun(tmp_path, ["rounds=1", *SETTINGS], monkeypatch, training=False)
    made.run()
    assert made.failures.keys() == {"site-4"}
    failure = made.failures["site-4"]
    assert isinstance(failure, SecurityError)
    assert "two histories at step 1" in failure.message
    assert failure.culprits == ("coordinator",)
    evidence = json.loads((copy_of(made, "site-4") / "fork.json").read_text())
    one, other = (Note.decode(note.encode()) for note in evidence["notes"])
    assert evidence["log"].startswith("coordinator/run/real-run+")
    assert one.text != other.text


def hide_the_first_attempt(recording: Callable[..., Any]) -> Callable[..., Any]:
    """What is told of attempt 2 goes into the log as if it were the first."""

    def hiding(log: RunLog, record: Callable[..., None]) -> Callable[..., None]:
        told = recording(log, lambda *_, **__: None)

        def tell(kind: str, **fields: Any) -> None:
            record(kind, **fields)
            if fields.get("attempt") == 2:
                told(kind, **{**fields, "attempt": 1})
            elif fields.get("attempt") != 1:
                told(kind, **fields)

        return tell

    return hiding


def test_hidden_attempt_is_caught_by_all_who_were_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miss_share_keys(monkeypatch, {"site-1", "site-3"})
    monkeypatch.setattr(RunLog, "recording", hide_the_first_attempt(RunLog.recording))
    made = RealRun(tmp_path, ["rounds=1", *SETTINGS, "timeouts.absence=1"], monkeypatch, training=False)
    assert run_to_its_end(made) is None
    assert made.failures.keys() == set(SITES)
    for failure in made.failures.values():
        assert failure.message == "audit log: the log has another context in attempt_opened of attempt 1.1"
        assert failure.culprits == ("coordinator",)


def test_reordered_log_is_caught_by_all_who_have_seen_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = RunLog.checkpoint

    def reorder(log: RunLog, step: int, key: Any) -> Note:
        if step == 1 and not (log._folder / "steps" / "1").exists():
            for name in ("site-1", "site-2"):
                log._log.append(Vetoed(participant=name))
        if step == 2 and not (log._folder / "steps" / "2").exists():
            path = log._folder / LOG
            content = (
                path.read_bytes().replace(b'site-1","time', b'SITE","time').replace(b'site-2","time', b'site-1","time')
            )
            path.write_bytes(content.replace(b'SITE","time', b'site-2","time'))
            (log._folder / CHECKPOINT).unlink()
            log.__init__(log._folder.parent, log._roster, "real-run", log._log._now)
        return checkpoint(log, step, key)

    monkeypatch.setattr(RunLog, "checkpoint", reorder)
    made = RealRun(tmp_path, ["rounds=2", *SETTINGS, "timeouts.absence=1"], monkeypatch, training=False)
    assert run_to_its_end(made) is None
    assert made.failures.keys() == set(SITES)
    for failure in made.failures.values():
        assert failure.message == "audit log: it is another one than this site has cosigned at step 1"
        assert failure.culprits == ("coordinator",)
