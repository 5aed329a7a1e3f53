"""The coordinator's end of a run's log."""

import datetime
from pathlib import Path

import pytest
from chronicle import COORDINATOR, make_roster
from samples import make_contract

from mpctf_secure.auditlog.note import Checkpoint, Note
from mpctf_secure.coordinator.audit import RunLog
from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.rounds.messages import LogRequest, Witnessed
from mpctf_secure.secagg.messages import Signed

KEYS = [SigningKey(bytes([number]) * 32) for number in range(1, 5)]
CONTRACT = make_contract()
ROSTER = make_roster(CONTRACT.participants, KEYS)
Z = "00" * 32


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def opened(folder: Path) -> tuple[RunLog, list[str]]:
    log, told = RunLog(folder, ROSTER, CONTRACT.run_id, now), []
    record = log.recording(lambda kind, **_: told.append(kind))
    begun = {"run": CONTRACT.run_id, "roster_version": 1, "roster_hash": CONTRACT.roster_hash, "package": Z}
    record("process_started", version="1", package=Z, protections=[])  # of a run that has not begun
    record("run_opened", **begun, participants=CONTRACT.participants)
    record("progress", round=1)
    record("contract_closed", contract_hash=CONTRACT.hash.hex(), base_model_hash=CONTRACT.base_model_hash)
    return log, told


def says(log: RunLog, key: SigningKey, step: int = 0) -> bytes:
    note = log.checkpoint(step, COORDINATOR)
    name = next(str(member.name) for member in ROSTER.members if member.identity == key.public)
    body = Witnessed(b"{}", note.cosigned(name, key, 1_893_456_000).signature, bytes(32))
    log.check(step, ROSTER.by_identity(key.public).identity, body)
    return Signed.make("accept", CONTRACT.run_context, key, body.encode()).encode()


def test_what_is_told_before_the_run_or_after_its_end_is_for_people_only(tmp_path: Path) -> None:
    log, told = opened(tmp_path)
    record = log.recording(lambda kind, **_: told.append(kind))
    record("run_ended", exit_code=5, reason="nobody came")
    record("refused", participant="bank-b", reason="late", member="bank-b", at="call")
    assert told == ["process_started", "run_opened", "progress", "contract_closed", "run_ended", "refused"]
    assert log.ended == 5
    assert log.close(COORDINATOR).size == 3
    assert (tmp_path / "audit" / "log.jsonl").read_bytes().count(b"\n") == 3


def test_certificate_is_the_same_in_whatever_order_its_messages_came(tmp_path: Path) -> None:
    """After a restart of the coordinator they come as the journal has them; its hash may be in the log already."""
    log, _ = opened(tmp_path)
    messages = [says(log, key) for key in KEYS]
    certificate, names = log.certify(0, messages)
    assert log.certify(0, messages[::-1]) == (certificate, names)
    assert names == ["a", "b", "c", "d"]


def test_cosignature_of_another_checkpoint_is_refused_before_it_counts(tmp_path: Path) -> None:
    log, _ = opened(tmp_path)
    log.checkpoint(0, COORDINATOR)
    other = Note(Checkpoint("coordinator/run/other", 2, bytes(32)).encode())
    body = Witnessed(b"{}", other.cosigned("a", KEYS[0], 1).signature, bytes(32))
    with pytest.raises(SecurityError):
        log.check(0, ROSTER.by_identity(KEYS[0].public).identity, body)


def test_leaves_go_out_in_pieces_from_where_they_broke_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpctf_secure.coordinator.audit._PIECE_BYTES", 50)
    log, _ = opened(tmp_path)
    note = log.checkpoint(0, COORDINATOR)
    sent, pieces = log.pieces(LogRequest(0, 0))
    whole = list(pieces)
    assert sent == note.encode()
    assert list(log.pieces(LogRequest(0, 0, held=2))[1]) == whole[2:]
    assert b"".join(log.pieces(LogRequest(0, 1))[1]) == b"".join(whole).split(b"\n", 1)[1]


def test_what_is_not_there_is_not_given(tmp_path: Path) -> None:
    log, _ = opened(tmp_path)
    log.checkpoint(0, COORDINATOR)
    with pytest.raises(SecurityError, match="step 1 is not due"):
        log.pieces(LogRequest(1, 0))
    with pytest.raises(SecurityError, match="has 2 leaves at step 0, and a witness has 3") as caught:
        log.pieces(LogRequest(0, 3))
    assert "restore" in caught.value.hint


def test_log_that_a_coordinator_tells_otherwise_ends_it(tmp_path: Path) -> None:
    log, _ = opened(tmp_path)
    record = log.recording(lambda *_, **__: None)
    record("contract_closed", contract_hash=CONTRACT.hash.hex(), base_model_hash=CONTRACT.base_model_hash)
    with pytest.raises(EnvironmentUnfitError, match="told otherwise before"):
        record("contract_closed", contract_hash=Z, base_model_hash=CONTRACT.base_model_hash)
