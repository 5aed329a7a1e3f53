import datetime

import pytest

from mpctf_secure.auditlog.entry import Entry
from mpctf_secure.auditlog.events import RunOpened
from mpctf_secure.auditlog.history import HistoryOfRun
from mpctf_secure.auditlog.note import Checkpoint, Key, Note
from mpctf_secure.auditlog.witness import (
    check_cosignature,
    check_step,
    demand,
    head,
    is_fork,
    origin_of_run,
    step_line,
    witnessed,
)
from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.signature import SigningKey

LOG, SITE, THIEF = (SigningKey(bytes([number]) * 32) for number in (1, 2, 3))
ORIGIN = origin_of_run("registry-x", "joint-1")
KEY, SITE_KEY = Key(ORIGIN, LOG.public), Key("hospital-a", SITE.public)


def note(size: int, root: int, step: int | None = 1, key: SigningKey = LOG, origin: str = ORIGIN) -> Note:
    extra = () if step is None else (step_line(step),)
    return Note(Checkpoint(origin, size, bytes([root]) * 32, extra).encode()).signed(origin, key)


def test_checkpoint_is_of_its_step_and_its_run_and_of_nobody_else() -> None:
    assert check_step(note(7, 1), KEY, 1).size == 7
    others = {
        "another step": note(7, 1, 2),
        "no step": note(7, 1, None),
        "a thief's": note(7, 1, key=THIEF),
        "another run's": note(7, 1, origin=origin_of_run("registry-x", "joint-2")),
    }
    for other in others.values():
        with pytest.raises(SecurityError):
            check_step(other, KEY, 1)


FORKS = {
    "one step, one size, two roots": (note(7, 1), note(7, 2), True),
    "one step, two sizes": (note(7, 1), note(8, 1), True),
    "two steps, one size, two roots": (note(7, 1, 1), note(7, 2, 2), True),
    "no step, one size, two roots": (note(7, 1, None), note(7, 2), True),
    "the same twice": (note(7, 1), note(7, 1), False),
    "a step in which nothing came": (note(7, 1, 1), note(7, 1, 2), False),
    "one that goes on": (note(7, 1, 1), note(8, 2, 2), False),
    "one that goes on to its end": (note(7, 1, None), note(8, 2, None), False),
    "one of them by a thief": (note(7, 1), note(7, 2, key=THIEF), False),
    "another log of the same key": (note(7, 1), note(7, 2, origin="registry-x/run/other"), False),
    "no checkpoint": (note(7, 1), Note("hello\n").signed(ORIGIN, LOG), False),
}


@pytest.mark.parametrize(("one", "other", "convicts"), FORKS.values(), ids=FORKS.keys())
def test_two_checkpoints_convict_only_who_has_signed_two_histories(one: Note, other: Note, convicts: bool) -> None:
    assert is_fork(one, other, KEY) == is_fork(other, one, KEY) == convicts


def test_cosignature_as_it_travels_is_that_of_the_note() -> None:
    given = note(7, 1)
    line = given.cosigned("hospital-a", SITE, 1_893_456_000)
    check_cosignature(given, SITE_KEY, line.signature)
    with pytest.raises(SecurityError):
        check_cosignature(note(8, 1), SITE_KEY, line.signature)
    with pytest.raises(SecurityError):
        check_cosignature(given, Key("hospital-a", THIEF.public), line.signature)


def test_witnessed_note_has_no_more_signatures_than_others_read() -> None:
    given = note(7, 1)
    keys = [Key(f"site-{number:03}", SITE.public) for number in range(120)]
    full = witnessed(given, [(key, given.cosigned(key.name, SITE, 1).signature) for key in reversed(keys)])
    assert [line.name for line in full.lines] == [ORIGIN, *(key.name for key in keys[:99])]
    assert full.cosigned_at(keys[0]) == 1


def test_commitment_to_an_own_log_binds_its_size_and_root() -> None:
    salt = bytes(32)
    commitments = {
        head(salt, 3, bytes(32)),
        head(salt, 4, bytes(32)),
        head(salt, 3, b"1" * 32),
        head(b"1" * 32, 3, bytes(32)),
    }
    assert len(commitments) == 4


def test_who_knows_better_is_told_what_the_log_hides() -> None:
    history = HistoryOfRun()
    opened = RunOpened(run="joint-1", roster_version=1, roster_hash="00" * 32, package="00" * 32, participants=())
    history.take(Entry(opened, datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)).encode())
    demand(history, "run_opened", run="joint-1")
    for kind, which, fields, why in (
        ("run_opened", (), {"run": "joint-2"}, "another run in run_opened"),
        ("round_closed", (3,), {}, "hides round_closed of round 3"),
        ("attempt_opened", (3, 2), {}, "hides attempt_opened of attempt 3.2"),
    ):
        with pytest.raises(SecurityError, match=why):
            demand(history, kind, *which, **fields)
