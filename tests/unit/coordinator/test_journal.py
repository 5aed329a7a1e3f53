import sqlite3
from pathlib import Path

import pytest

from mpctf_secure.coordinator.journal import Attempt, Banned, Closed, Ended, Finished, GateKey, Journal, Message
from mpctf_secure.database import is_in_use
from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.ids import IdentityKey

A, B = (IdentityKey(bytes([i]) * 32) for i in range(2))
RUN, ROUND = GateKey("facts", b"r" * 32, 0), GateKey("advert", b"c" * 32, 1)
ROWS = [
    Message(RUN, A, b"\0facts"), Closed(RUN, {}, 1.5), Banned(B, "two things"), Message(ROUND, A, b"advert"),
    Attempt(1, 2, (A, B)), Attempt(1, 3, ()), Closed(ROUND, {B: "no answer in 5 s"}, 5.25),
]  # fmt: skip


def test_rows_come_back_in_their_order_after_a_crash(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for row in ROWS:
        journal.add(row)
    journal._db._lock.close()  # what a killed process leaves: no checkpoint, nothing closed
    assert list(Journal(tmp_path).rows()) == ROWS


def test_finished_round_leaves_its_outcome_and_the_rows_of_the_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for row in ROWS:
        journal.add(row)
    finished = Finished(1, b"outcome", b"certificate", {"round": 1})
    journal.finish(finished)
    journal.end(Ended(5, "too few"))
    journal.close()
    again = Journal(tmp_path)
    assert list(again.rows()) == ROWS[:3]
    assert again.finished() == [finished]
    assert again.ended == Ended(5, "too few")


def test_nobody_says_two_things_and_no_gate_is_closed_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    said, closed = Message(ROUND, A, b"m"), Closed(ROUND, {}, 1.0)
    for row, other in ((said, Message(ROUND, A, b"other")), (closed, Closed(ROUND, {A: "late"}, 2.0))):
        journal.add(row)
        with pytest.raises(sqlite3.IntegrityError):
            journal.add(other)
    assert list(journal.rows()) == [said, closed]


def test_before_the_first_round_the_last_word_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for body in (b"one base model", b"another"):
        journal.add(Message(RUN, A, body))
    assert list(journal.rows()) == [Message(RUN, A, b"another")]


def test_second_process_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(EnvironmentUnfitError, match="another process has this run"):
        Journal(tmp_path)
    journal.close()
    for path in tmp_path.glob("run.sqlite*"):
        path.write_bytes(b"no database" * 100)
    with pytest.raises(EnvironmentUnfitError, match=r"run\.sqlite: file is not a database"):
        Journal(tmp_path)


def test_run_that_was_killed_before_it_had_a_journal_is_shown(tmp_path: Path) -> None:
    assert Journal.peek(tmp_path) == ([], None)
    assert not is_in_use(tmp_path)


def test_only_the_owner_reads_it(tmp_path: Path) -> None:
    Journal(tmp_path)
    assert (tmp_path / "run.sqlite").stat().st_mode & 0o077 == 0
