"""Attempts that fail and rounds that cannot be finished, in real runs."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from e2e.harness import Outcome, RealRun, Recorder, miss_share_keys, published

from mpctf_secure.coordinator.reception import Reception
from mpctf_secure.coordinator.runtime import AbsentError
from mpctf_secure.hazmat import shamir
from mpctf_secure.hazmat.encoding import Reader
from mpctf_secure.identity.roster import Member
from mpctf_secure.participant.members import Members
from mpctf_secure.secagg.client import Client

SETTINGS = ["rounds=2", "timeouts.training=60"]


def assert_exact(outcome: Outcome, number: int, names: list[str]) -> None:
    record = outcome.coordinator.ledger.rounds[number - 1]
    assert record.survivors == names
    lanes, scalars = published(outcome, number, record.ring_bits)
    given = [outcome.inputs[name, number] for name in names]
    assert np.array_equal(lanes, np.sum([one.lanes for one in given], axis=0, dtype=lanes.dtype))
    assert np.array_equal(scalars, np.sum([one.scalars for one in given], axis=0, dtype=scalars.dtype))


def test_attempt_below_the_floor_is_followed_by_one_with_the_same_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four miss share keys in attempt 1, as when a network blinks; nobody trains again."""
    miss_share_keys(monkeypatch, {"site-1", "site-3"})
    run = RealRun(tmp_path, [*SETTINGS, "timeouts.stage=5"], monkeypatch, training=False)
    outcome = run.run()
    first, second = outcome.coordinator.ledger.rounds
    assert (first.attempts, first.void, second.attempts) == (2, None, 1)
    failed = [event for event in outcome.events if event["event"] == "attempt_failed"]
    assert [(event["round"], event["attempt"]) for event in failed] == [(1, 1)]
    for number in (1, 2):
        assert_exact(outcome, number, ["site-1", "site-2", "site-3", "site-4"])
    assert outcome.encoded["site-1", 1] == 1


def test_upload_that_takes_longer_than_a_stage_is_waited_for_while_it_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all four each piece comes 1.2 s late, 4.8 s for an upload: the stage's 3 s count from the last chunk."""
    original = Recorder.upload

    async def upload(recorder: Recorder, peer: Member, pieces: AsyncIterator[bytes]) -> bytes:
        async def slowly() -> AsyncIterator[bytes]:
            async for piece in pieces:
                await asyncio.sleep(1.2)
                yield piece

        return await original(recorder, peer, slowly())

    monkeypatch.setattr(Recorder, "upload", upload)
    run = RealRun(tmp_path, ["rounds=1", "timeouts.stage=3"], monkeypatch, training=False)
    outcome = run.run()
    assert outcome.coordinator.ledger.rounds[0].seconds["masked input"] > 4
    assert outcome.coordinator.ledger.rounds[0].dropouts == []
    assert_exact(outcome, 1, ["site-1", "site-2", "site-3", "site-4"])


def test_upload_that_stands_still_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, stop = Recorder.upload, asyncio.Event()

    async def upload(recorder: Recorder, peer: Member, pieces: AsyncIterator[bytes]) -> bytes:
        async def one_piece() -> AsyncIterator[bytes]:
            yield await anext(pieces)
            await stop.wait()

        return await original(recorder, peer, one_piece() if peer.name == "site-2" else pieces)

    monkeypatch.setattr(Recorder, "upload", upload)
    run = RealRun(tmp_path, ["rounds=1", "timeouts.stage=3"], monkeypatch, training=False)
    outcome = run.run()
    record = outcome.coordinator.ledger.rounds[0]
    assert [(entry["participant"], entry["stage"]) for entry in record.dropouts] == [("site-2", "masked input")]
    assert_exact(outcome, 1, ["site-1", "site-3", "site-4"])


def test_dealer_of_boxes_that_do_not_open_is_named_and_the_next_attempt_does_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four cannot open site-2's boxes, more than may collude (1); the same inputs are summed without it."""
    run = RealRun(tmp_path, ["rounds=1", "timeouts.training=60", "timeouts.stage=60"], monkeypatch, training=False)
    by_name = {member.name: member.identity for member in run.roster.members}
    original = Client._seal

    def seal(client: Client, recipient, pair) -> bytes:
        spoilt = client.me == by_name["site-2"] and recipient in {by_name["site-1"], by_name["site-3"]}
        return bytes(90) if spoilt else original(client, recipient, pair)

    monkeypatch.setattr(Client, "_seal", seal)
    outcome = run.run()
    refused = [event for event in outcome.events if event["event"] == "box_refused"]
    assert sorted(event["participant"] for event in refused) == ["site-1", "site-3"]
    assert {event["dealer"] for event in refused} == {"site-2"}
    record = outcome.coordinator.ledger.rounds[0]
    assert (record.attempts, record.void) == (2, None)
    assert_exact(outcome, 1, ["site-1", "site-3", "site-4"])
    reasons = {entry["participant"]: entry["reason"] for entry in record.dropouts}
    assert reasons["site-1"] == "refused the box of site-2"
    assert "more participants than may collude" in reasons["site-2"]
    assert outcome.encoded["site-1", 1] == 1


def test_member_that_is_removed_between_training_and_cohort_is_in_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator hears of it once site-2 is ready, the sites a moment earlier: all agree on three."""
    run = RealRun(tmp_path, ["rounds=1", "timeouts.training=60", "timeouts.stage=60"], monkeypatch, training=False)
    removed = next(m for m in run.roster.members if m.name == "site-2").identity
    original = Recorder.exchange

    async def exchange(recorder: Recorder, peer: Member, request: bytes) -> bytes:
        if Reader(request).text() == "ready":
            reception = recorder.inner.reception
            gate = next(gate for key, gate in reception._gates.items() if key.label == "ready")
            if peer.name != "site-2":
                while removed not in {*gate.arrived, *reception.banned}:
                    await asyncio.sleep(0.05)
                reception.ban(removed, "not in roster version 2")
        return await original(recorder, peer, request)

    monkeypatch.setattr(Recorder, "exchange", exchange)
    monkeypatch.setattr(Members, "left", lambda members: set(members.identities - {removed}))
    outcome = run.run()
    record = outcome.coordinator.ledger.rounds[0]
    assert (record.attempts, record.void, record.cohort) == (1, None, ["site-1", "site-3", "site-4"])
    assert_exact(outcome, 1, ["site-1", "site-3", "site-4"])


REASON = "refuses: attempt 1 of round 1 with site-2, not in roster version 1"


@pytest.mark.parametrize("heard", [True, False])
def test_coordinator_that_has_not_heard_of_a_removal_is_told_and_no_round_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: bool
) -> None:
    """The sites have a newer roster; the coordinator gets it just after the first attempt, or not at all."""
    run = RealRun(tmp_path, [*SETTINGS, "timeouts.stage=60"], monkeypatch, training=False)
    removed = next(m for m in run.roster.members if m.name == "site-2").identity
    original = Reception.decided

    async def decided(reception: Reception, number: int, attempt: int) -> bool:
        if heard:
            reception.look = lambda: reception.ban(removed, "not in roster version 2")
        return await original(reception, number, attempt)

    monkeypatch.setattr(Reception, "decided", decided)
    monkeypatch.setattr(Members, "left", lambda members: set(members.identities - {removed}))
    monkeypatch.setattr(Members, "gone", lambda _: ["site-2"])
    if not heard:
        with pytest.raises(AbsentError, match=f"site-. {REASON}"):
            run.run()
        return
    outcome = run.run()
    first, _ = outcome.coordinator.ledger.rounds
    assert (first.attempts, first.void) == (2, None)
    assert f"refuses: {next(e['reason'] for e in outcome.events if e['event'] == 'veto')}" == REASON
    for number in (1, 2):
        assert_exact(outcome, number, ["site-1", "site-3", "site-4"])
    assert outcome.encoded["site-1", 1] == 1


def test_bad_dealer_is_convicted_the_round_is_void_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """site-2 deals shares that match its commitments and give another self-mask seed than it announced."""
    run = RealRun(tmp_path, [*SETTINGS, "timeouts.stage=30"], monkeypatch, training=False)
    liar = next(m for m in run.roster.members if m.name == "site-2").identity
    original, honest, spoilt = Client._deal, shamir.split, set()

    def deal(client: Client):
        if client.me == liar:
            spoilt.add(client._secrets.self_mask)
        return original(client)

    # For this one secret only: the other participants deal in other threads at the same time.
    monkeypatch.setattr(Client, "_deal", deal)
    monkeypatch.setattr(shamir, "split", lambda secret, *rest: honest(bytes(32) if secret in spoilt else secret, *rest))
    outcome = run.run()
    first, second = outcome.coordinator.ledger.rounds
    assert "self-mask shares give another secret" in first.void
    assert outcome.state.voids == 1
    assert outcome.state.convicted == (liar,)
    assert_exact(outcome, 2, ["site-1", "site-3", "site-4"])
    assert second.cohort == ["site-1", "site-3", "site-4"]


def test_round_whose_sum_no_honest_sites_can_make_is_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site counts more rows than the contract allows; nobody can say which, and the next round goes on."""
    run = RealRun(tmp_path, [*SETTINGS, "timeouts.stage=30"], monkeypatch, training=False)
    spoilt = []

    def spoil(name: str, number: int, contribution):
        if (name, number) != ("site-2", 1):
            return contribution
        spoilt.append(name)
        return replace(contribution, scalars=(10_000, *contribution.scalars[1:]))

    run.change = spoil
    outcome = run.run()
    first = outcome.coordinator.ledger.rounds[0]
    assert spoilt == ["site-2"]
    assert "rows" in first.void
    assert "masks hide which" in first.void
    assert first.survivors == []
    assert_exact(outcome, 2, ["site-1", "site-2", "site-3", "site-4"])
    assert (outcome.state.round, outcome.state.voids) == (2, 1)
