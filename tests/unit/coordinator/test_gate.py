import asyncio

import pytest
from loops import in_loop

from mpctf_secure.coordinator.gate import SKIP, Answer, Gate
from mpctf_secure.coordinator.journal import Closed, GateKey, Message
from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.ids import IdentityKey

A, B, C = (IdentityKey(bytes([i]) * 32) for i in range(3))
KEY = GateKey("advert", bytes(32), 1)
YES = Answer("yes", b"")


def refuse(sender: IdentityKey, message: bytes) -> None:
    if message == b"bad":
        raise SecurityError("bad", culprits=[sender.hex()])


@in_loop
async def test_all_arrive_and_all_are_answered() -> None:
    gate = Gate(KEY, [A, B], refuse)
    waiting = [asyncio.create_task(gate.enter(member, b"m")) for member in (A, B)]
    await gate.collect(10, 2)
    assert gate.left == {}
    assert set(gate.arrived) == {A, B}
    gate.answer({A: YES, B: Answer("b", b"only for b")})
    assert await asyncio.gather(*waiting) == [YES, Answer("b", b"only for b")]


@in_loop
async def test_late_one_is_skipped_and_a_lost_answer_is_given_again() -> None:
    gate = Gate(KEY, [A, B], refuse)
    first = asyncio.create_task(gate.enter(A, b"m"))
    await gate.collect(0.01, 1)
    assert gate.left == {B: "no answer in 0.01 s"}
    gate.answer({A: YES})
    assert await first == YES
    assert await gate.enter(A, b"m") == YES
    assert await gate.enter(B, b"m") == SKIP


@in_loop
async def test_gate_closes_at_once_when_too_few_can_still_come() -> None:
    gate = Gate(KEY, [A, B, C], refuse)
    collecting = asyncio.create_task(gate.collect(1000, 2))
    await asyncio.sleep(0)
    gate.drop(A, "left")
    gate.drop(B, "left")
    await asyncio.wait_for(collecting, 5)


@in_loop
async def test_refused_message_neither_arrives_nor_stops_the_others() -> None:
    gate = Gate(KEY, [A, B], refuse)
    with pytest.raises(SecurityError):
        await gate.enter(A, b"bad")
    assert gate.awaited == {A, B}
    assert gate.arrived == []


@in_loop
async def test_closed_gate_accepts_nothing_and_lets_nobody_fail() -> None:
    """A repeated message that comes while the sum is being opened must not cost its sender the run."""
    gate = Gate(KEY, [A, B], refuse)
    first = asyncio.create_task(gate.enter(A, b"m"))
    await gate.collect(0.01, 1)
    again, late = (asyncio.create_task(gate.enter(*what)) for what in ((A, b"m"), (B, b"bad")))
    await asyncio.sleep(0)
    assert gate.arrived == [A]
    gate.answer({A: YES})
    assert await asyncio.gather(first, again, late) == [YES, YES, SKIP]


@in_loop
async def test_stranger_is_not_counted() -> None:
    gate = Gate(KEY, [A], refuse)
    stranger = asyncio.create_task(gate.enter(C, b"m"))
    await asyncio.sleep(0)
    assert gate.arrived == []
    gate.answer({})
    assert await stranger == SKIP


@in_loop
async def test_message_and_closing_are_logged_before_anything_follows_and_replayed_alike() -> None:
    log: list[object] = []
    gate = Gate(KEY, [A, B], refuse, log.append)
    waiting = asyncio.create_task(gate.enter(A, b"m"))
    await gate.collect(0.01, 1)
    assert log == [Message(KEY, A, b"m"), Closed(KEY, {B: "no answer in 0.01 s"}, gate.seconds)]
    gate.answer({A: YES})
    assert await waiting == YES

    live = asyncio.Event()
    again = Gate(KEY, [A, B, C], refuse, log.append, live)
    collecting = asyncio.create_task(again.collect(0.0, 3))
    again.take(A, b"m")
    await asyncio.sleep(0.01)
    assert not collecting.done()  # neither the clock nor who is missing counts before the log is read
    again.close_as(gate.left, gate.seconds)
    await collecting
    assert (again.arrived, again.left, again.seconds) == ([A], gate.left, gate.seconds)
    assert len(log) == 2


@in_loop
async def test_two_different_messages_of_one_sender_are_refused_and_the_first_counts() -> None:
    gate = Gate(KEY, [A, B], refuse)
    first = asyncio.create_task(gate.enter(A, b"m"))
    await asyncio.sleep(0)
    with pytest.raises(SecurityError, match="a second, different advert message"):
        await gate.enter(A, b"n")
    gate.answer({}, otherwise=YES)
    assert await first == YES
    assert gate.messages == [b"m"]
    with pytest.raises(SecurityError, match="a second, different advert message"):
        await gate.enter(A, b"n")  # another machine with the same keys comes a moment later
    assert await gate.enter(A, b"m") == YES


@in_loop
async def test_before_the_first_round_a_site_may_mend_what_it_says() -> None:
    log: list[object] = []
    gate = Gate(KEY._replace(round=0), [A, B], refuse, log.append)
    calls = [asyncio.create_task(gate.enter(A, message)) for message in (b"m", b"n", b"n")]
    await asyncio.sleep(0)
    assert gate.messages == [b"n"]
    assert [row.body for row in log if isinstance(row, Message)] == [b"m", b"n"]
    gate.answer({}, otherwise=YES)
    assert await asyncio.gather(*calls) == [YES] * 3


@in_loop
async def test_who_was_lost_may_come_back_while_the_gate_is_open() -> None:
    gate = Gate(KEY, [A, B], refuse)
    gate.drop(A, "its process ended")
    back = asyncio.create_task(gate.enter(A, b"m"))
    await asyncio.sleep(0)
    assert (gate.arrived, gate.left) == ([A], {})
    gate.answer({}, otherwise=YES)
    assert await back == YES


@in_loop
async def test_error_behind_a_gate_reaches_who_collects() -> None:
    """What was accepted and could not be logged must not be counted on after all."""
    gate = Gate(KEY, [A, B], refuse)
    collecting = asyncio.create_task(gate.collect(60, 1))
    await asyncio.sleep(0)
    gate.fail(EnvironmentUnfitError("disk full"))
    with pytest.raises(EnvironmentUnfitError):
        await collecting
    assert not gate.closed


@in_loop
async def test_who_is_expelled_is_not_counted_and_a_closed_gate_stays_as_it_is() -> None:
    """Else a member that is removed after it came to `ready` is in a cohort that its peers refuse."""
    gate = Gate(KEY, [A, B, C], refuse)
    gate.take(A, b"m")
    gate.take(B, b"m")
    gate.expel(A, "not in roster version 2")
    assert (gate.arrived, gate.left) == ([B], {A: "not in roster version 2"})
    gate.answer({})
    gate.expel(B, "not in roster version 3")
    assert gate.arrived == [B]
