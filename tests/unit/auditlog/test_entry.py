import contextlib
import datetime
import json

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st
from unit.auditlog import vectors

from mpctf_secure.auditlog.entry import MOST_BYTES, Entry, to_text
from mpctf_secure.auditlog.events import Dropout, OfRun, ProcessStarted, RunEnded, leaf_of
from mpctf_secure.errors import DecodeError

TIME = datetime.datetime(2030, 1, 2, 3, 4, 5, 678000, tzinfo=datetime.UTC)
ENTRY = Entry(Dropout(round=3, participant="hospital-a", stage="masked input"), TIME)
LINE = ENTRY.encode()


def test_leaf_is_canonical_json_with_its_time() -> None:
    assert LINE == (
        b'{"kind":"dropout","participant":"hospital-a","round":3,'
        b'"stage":"masked input","time":"2030-01-02T03:04:05.678Z"}'
    )
    assert Entry.decode(LINE, OfRun) == ENTRY


def changed(**fields: object) -> bytes:
    return rfc8785.dumps({**json.loads(LINE), **fields})


NO_LEAVES = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[1]",
    "a number": b"7",
    "white space": LINE.replace(b",", b", "),
    "another order of keys": b'{"time":"2030-01-02T03:04:05.678Z",'
    + LINE[1:].replace(b',"time":"2030-01-02T03:04:05.678Z"', b""),
    "a key twice": LINE.replace(b'"round":3', b'"round":3,"round":3'),
    "an unknown kind": changed(kind="lunch"),
    "an unknown field": changed(rows=7),
    "a missing field": LINE.replace(b'"round":3,', b""),
    "no time": LINE.replace(b',"time":"2030-01-02T03:04:05.678Z"', b""),
    "a time without a zone": changed(time="2030-01-02T03:04:05.678"),
    "a time in another zone": changed(time="2030-01-02T04:04:05.678+01:00"),
    "a time in microseconds": changed(time="2030-01-02T03:04:05.678901Z"),
    "a time that is a number": changed(time=7),
    "a time that never was": changed(time="2030-02-30T03:04:05.678Z"),
    "the year zero": changed(time="0000-01-02T03:04:05.678Z"),
    "a number as text": changed(round="3"),
    "a number that is none": LINE.replace(b"3,", b"NaN,", 1),
    "infinity": LINE.replace(b'"round":3', b'"round":Infinity'),
    "a number beyond 2^53": LINE.replace(b'"round":3', b'"round":9007199254740993'),
    "a number below zero": changed(round=-3),
    "a fraction": changed(round=3.5),
    "a whole number with a point": LINE.replace(b'"round":3', b'"round":3.0'),
    "a huge number": LINE.replace(b'"round":3', b'"round":1' + b"0" * 5000),
    "a line end in a name": changed(participant="hospital-a\n"),
    "a line separator in a name": changed(participant="hospital\u2028a"),
    "a capital letter in a name": changed(participant="Hospital-A"),
    "a long text": changed(stage="x" * 101),
    "a surrogate": LINE.replace(b"masked", b"\\ud800"),
    "not UTF-8": LINE.replace(b"masked", b"\xff"),
    "nested without end": b"[" * 100_000,
    "too long": changed(stage="x" * MOST_BYTES),
}


@pytest.mark.parametrize("line", NO_LEAVES.values(), ids=NO_LEAVES.keys())
def test_what_is_no_leaf_is_refused(line: bytes) -> None:
    with pytest.raises(DecodeError):
        Entry.decode(line, OfRun)


@given(st.text(max_size=100))
def test_hostile_text_stays_in_its_line_and_comes_back(text: str) -> None:
    try:
        event = ProcessStarted(version=text, package="00" * 32, protections=())
        line = Entry(event, TIME).encode()
    except ValueError:
        assert any("\ud800" <= character <= "\udfff" for character in text)
        return
    assert b"\n" not in line
    assert Entry.decode(line, OfRun).event == event


@given(
    st.binary()
    | st.builds(lambda at, with_: LINE[:at] + with_ + LINE[at + 1 :], st.integers(0, len(LINE)), st.binary(max_size=2))
)
def test_any_bytes_are_one_leaf_or_refused(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        assert Entry.decode(data, OfRun).encode() == data


@given(st.datetimes(min_value=datetime.datetime(1970, 1, 1), timezones=st.just(datetime.UTC)))
def test_times_are_ordered_as_they_are_written(time: datetime.datetime) -> None:
    later = min(time, datetime.datetime(9998, 1, 1, tzinfo=datetime.UTC)) + datetime.timedelta(milliseconds=1)
    assert to_text(later) != to_text(later - datetime.timedelta(milliseconds=1))
    assert datetime.datetime.fromisoformat(to_text(time)) <= time


def test_of_what_is_told_only_the_fields_of_the_leaf_get_into_the_log() -> None:
    leaf = leaf_of("dropout", {"round": 1, "participant": "bank-b", "stage": "training", "reason": "ask Dr. Meier"})
    assert leaf == Dropout(round=1, participant="bank-b", stage="training")
    assert leaf_of("progress", {"round": 1}) is None
    assert leaf_of("run_ended", {"exit_code": 4, "reason": "secret"}) == RunEnded(exit_code=4)


@vectors.needed
@pytest.mark.parametrize("name", ["arrays", "french", "structures", "unicode", "values", "weird"])
def test_canonical_form_is_that_of_rfc_8785(name: str) -> None:
    folder = vectors.FOLDER / "rfc8785" / "testdata"
    expected = bytes.fromhex((folder / "outhex" / f"{name}.txt").read_text().replace("\n", " "))
    assert rfc8785.dumps(json.loads((folder / "input" / f"{name}.json").read_text())) == expected
