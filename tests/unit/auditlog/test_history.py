"""In which order leaves can come, one test a sentence."""

import datetime
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.auditlog.entry import Entry, to_text
from mpctf_secure.auditlog.events import (
    AttemptFailed,
    AttemptOpened,
    Banned,
    ClockSet,
    ContractClosed,
    Dropout,
    Leaf,
    RoundClosed,
    RoundVoid,
    RunEnded,
    RunOpened,
    StepWitnessed,
    SumPublished,
    Vetoed,
)
from mpctf_secure.auditlog.history import History, HistoryOfRun
from mpctf_secure.errors import SecurityError

BEGAN = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
H = "ab" * 32
OPENED = RunOpened(run="joint", roster_version=1, roster_hash=H, package=H, participants=("a", "b"))
CLOSED = ContractClosed(contract_hash=H, base_model_hash=H)
ENDED = RunEnded(exit_code=0)


def step(number: int) -> Leaf:
    return StepWitnessed(round=number, certificate=H, witnesses=())


def attempt(number: int, which: int = 1) -> Leaf:
    return AttemptOpened(round=number, attempt=which, context=H, cohort=())


def failed(number: int, which: int = 1) -> Leaf:
    return AttemptFailed(round=number, attempt=which, tuple=None)


def published(number: int, which: int = 1) -> Leaf:
    return SumPublished(round=number, attempt=which, tuple=H, survivors=(), recovered=(), digest=H)


def void(number: int, which: int = 1) -> Leaf:
    return RoundVoid(round=number, attempt=which, convicted=None)


def closed(number: int) -> Leaf:
    return RoundClosed(round=number, state_hash=H)


def tell(events: Iterable[Leaf], history: History | None = None) -> History:
    history = history or HistoryOfRun()
    for number, event in enumerate(events):
        history.take(Entry(event, BEGAN + datetime.timedelta(seconds=number)).encode())
    return history


ROUND_1 = (OPENED, CLOSED, step(0), attempt(1), published(1), closed(1))
STORIES = {
    "a run of two rounds": (*ROUND_1, step(1), attempt(2), published(2), closed(2), step(2), ENDED),
    "a run that is not over": ROUND_1,
    "three attempts": (*ROUND_1[:4], failed(1), attempt(1, 2), failed(1, 2), attempt(1, 3), published(1, 3), closed(1)),
    "a void round": (*ROUND_1[:4], failed(1), void(1), closed(1), step(1), attempt(2), published(2)),
    "an end before there is a contract": (OPENED, ENDED),
    "an end in the middle of an attempt": (*ROUND_1[:4], ENDED),
    "other things in between": (OPENED, Vetoed(participant="a"), CLOSED, Banned(participant="a"), step(0)),
    "the same again, where that may be": (OPENED, *[Dropout(round=1, participant="a", stage="training")] * 2),
}


@pytest.mark.parametrize("events", STORIES.values(), ids=STORIES.keys())
def test_log_can_tell_of(events: tuple[Leaf, ...]) -> None:
    tell(events)


LIES = {
    "nothing before something else": ((Vetoed(participant="a"),), "begins with veto"),
    "a beginning without an opening": ((CLOSED,), "begins with contract_closed"),
    "two openings": ((OPENED, OPENED), "twice"),
    "an attempt without a contract": ((OPENED, attempt(1)), "contract_closed is due"),
    "an attempt that no step opens": ((OPENED, CLOSED, attempt(1)), "step_witnessed is due"),
    "a sum without an attempt": ((OPENED, CLOSED, step(0), published(1)), "attempt_opened is due"),
    "a round that is left out": ((*ROUND_1, step(1), attempt(3)), "another round than 2"),
    "a round that comes again": ((*ROUND_1, step(1), attempt(1, 2)), "another round than 2"),
    "an attempt that is left out": ((*ROUND_1[:4], failed(1), attempt(1, 3)), "another attempt than 2"),
    "a sum of another attempt": ((*ROUND_1[:4], published(1, 2)), "another attempt than 1"),
    "two sums of a round": ((*ROUND_1[:5], published(1)), "twice"),
    "a void round with a sum": ((*ROUND_1[:5], void(1)), "round_closed is due"),
    "a void round without a failure": ((*ROUND_1[:4], void(1)), "sum_published is due"),
    "a step of another round": ((*ROUND_1, step(2)), "another round than 1"),
    "a round without an outcome": ((*ROUND_1[:4], closed(1)), "sum_published is due"),
    "something after the end": ((OPENED, ENDED, Vetoed(participant="a")), "after the end"),
    "two ends": ((OPENED, ENDED, ENDED), "twice"),
    "an end before the beginning": ((ENDED,), "begins with run_ended"),
}


@pytest.mark.parametrize(("events", "why"), LIES.values(), ids=LIES.keys())
def test_log_cannot_tell_of(events: tuple[Leaf, ...], why: str) -> None:
    history = tell(events[:-1])
    size, root = len(history.tree), history.tree.root()
    with pytest.raises(SecurityError, match=why):
        history.take(Entry(events[-1], BEGAN + datetime.timedelta(seconds=len(events))).encode())
    assert (len(history.tree), history.tree.root()) == (size, root)


def at(seconds: int, event: Leaf) -> bytes:
    return Entry(event, BEGAN + datetime.timedelta(seconds=seconds)).encode()


def test_clock_that_was_set_back_is_told_of_at_that_moment_and_only_then() -> None:
    history = tell([OPENED])
    history.take(at(60, Vetoed(participant="a")))
    with pytest.raises(SecurityError, match="after a leaf of 2030-01-01T00:01:00"):
        history.take(at(30, Vetoed(participant="a")))
    minute = to_text(BEGAN + datetime.timedelta(seconds=60))
    with pytest.raises(SecurityError):
        history.take(at(90, ClockSet(before=minute)))
    with pytest.raises(SecurityError):
        history.take(at(30, ClockSet(before=to_text(BEGAN))))
    history.take(at(30, ClockSet(before=minute)))
    history.take(at(30, Vetoed(participant="a")))


@given(st.permutations(STORIES["a run of two rounds"]))
def test_no_other_order_of_the_same_leaves_is_taken(events: list[Leaf]) -> None:
    if tuple(events) == STORIES["a run of two rounds"]:
        tell(events)
    else:
        with pytest.raises(SecurityError):
            tell(events)
