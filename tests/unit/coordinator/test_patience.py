from collections.abc import Callable

import pytest

from mpctf_secure.coordinator.patience import SLOW, ForQuorum, ForUploads
from mpctf_secure.ids import IdentityKey

A, B, C, D = (IdentityKey(bytes([i]) * 32) for i in range(4))
NAMES = {"a": A, "b": B, "c": C, "d": D}


class Gate:
    """A gate of four; a test says who is in, and when it is."""

    def __init__(self) -> None:
        self._age = 0.0
        self.arrived: list[IdentityKey] = []
        self.awaited = {A, B, C, D}
        self.left: dict[IdentityKey, str] = {}

    @property
    def age(self) -> float:
        """Time goes on while somebody asks."""
        self._age += 1e-6
        return self._age

    def at(self, age: float, arrived: str) -> "Gate":
        self._age, self.arrived = age, [NAMES[name] for name in arrived]
        self.awaited = {A, B, C, D} - set(self.arrived) - self.left.keys()
        return self

    def drop(self, member: IdentityKey, reason: str) -> None:
        self.awaited.discard(member)
        self.left[member] = reason


# Each moment: seconds, who is in, who else is there, whether waiting is over. Quorum 3, stage 10 s, absence 60 s.
QUORUMS = {
    "all come": ([(5.0, "abcd", "", True)], {}),
    "a quorum that trains for days is waited for": ([(1e5, "ab", "cd", False), (3e5, "ab", "c", False)], {}),
    "who is away is not waited for, once a quorum is in": (
        [(99, "ab", "cd", False), (100, "abc", "", True)], {D: "absent"}),
    "who is there has as long again, and a stage": (
        [(100, "abc", "d", False), (209, "abc", "d", False), (211, "abc", "d", True)], {D: SLOW}),
    "who goes away while it is waited for": (
        [(100, "abc", "d", False), (150, "abc", "", True)], {D: "absent"}),
    "too few are there": (
        [(50, "ab", "c", False), (109, "ab", "", False), (111, "ab", "", True)],
        {C: "absent for 60 s", D: "absent for 60 s"}),
    "too few were there for a while": (
        [(50, "ab", "", False), (55, "ab", "c", False), (100, "ab", "", False), (114, "ab", "", False)], {}),
}  # fmt: skip


@pytest.mark.parametrize(("moments", "left"), QUORUMS.values(), ids=QUORUMS.keys())
def test_quorum_is_waited_for(moments, left) -> None:
    gate, there = Gate(), set[IdentityKey]()
    patience = ForQuorum(3, 10.0, 60.0, lambda member: member in there)
    for seconds, arrived, present, over in moments:
        there.clear()
        there.update(NAMES[name] for name in present)
        assert patience.is_over(gate.at(seconds, arrived)) == over
    assert gate.left == left


def test_who_is_there_is_waited_for_although_nobody_who_leaves_comes_back() -> None:
    """As with local participants: an absence of no seconds."""
    gate, patience = Gate(), ForQuorum(3, 10.0, 0.0, lambda member: member != D)
    assert [patience.is_over(gate.at(seconds, "a")) for seconds in (0.0, 1.0, 100.0)] == [False] * 3
    patience = ForQuorum(3, 10.0, 0.0, lambda member: member == A)
    assert patience.is_over(gate.at(101.0, ""))


def test_that_there_is_no_quorum_is_told_once_of_each_time() -> None:
    told: list[set[IdentityKey]] = []
    there = {B}
    gate, patience = Gate(), ForQuorum(3, 10.0, 60.0, there.__contains__, told.append)
    for seconds in (0.0, 1.0):
        patience.is_over(gate.at(seconds, "a"))
    assert told == [{C, D}]
    there.add(C)
    patience.is_over(gate.at(2.0, "a"))
    there.clear()
    patience.is_over(gate.at(3.0, "a"))
    assert told == [{C, D}, {B, C, D}]


# Each moment: seconds, who is in, when the last chunk came, whether waiting is over. Enough are 3, a stage is 10 s.
NEVER = float("-inf")
UPLOADS = {
    "nobody sends": ([(9, "", NEVER, False), (11, "", NEVER, True)],
        dict.fromkeys((A, B, C, D), "nothing came for 10 s")),
    "a slow line, before enough are in": ([(500, "ab", 495, False), (900, "ab", 899, False)], {}),
    "a line that stands still": ([(500, "ab", 495, False), (506, "ab", 495, True)],
        dict.fromkeys((C, D), "nothing came for 10 s")),
    "a line much slower than the others": ([(100, "abc", 100, False), (209, "abc", 208, False),
        (211, "abc", 211, True)], {D: SLOW}),
    "a line that stands still, once enough are in": ([(100, "abc", 100, False), (111, "abc", 100, True)],
        {D: "nothing came for 10 s"}),
}  # fmt: skip


@pytest.mark.parametrize(("moments", "left"), UPLOADS.values(), ids=UPLOADS.keys())
def test_uploads_are_waited_for_while_they_move(moments, left) -> None:
    gate, still = Gate(), 0.0
    asked: Callable[[], float] = lambda: still  # noqa: E731
    patience = ForUploads(3, 10.0, asked)
    for seconds, arrived, moved, over in moments:
        still = seconds - moved
        assert patience.is_over(gate.at(seconds, arrived)) == over
    assert gate.left == left
