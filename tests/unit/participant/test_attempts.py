"""A site in the attempts of a round: what it repeats, and what it refuses to do twice."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from durable import DurableClient, announcement, open_attempts
from simulator import Attempt

from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.encoding import decode_sequence, enc_sequence
from mpctf_secure.participant.attempts import Attempts
from mpctf_secure.participant.round_file import LostRoundError
from mpctf_secure.secagg.messages import Survivors
from mpctf_secure.secagg.parameters import Context
from mpctf_secure.secagg.server import Server


def durable(home: Path, attempt: Attempt) -> list[DurableClient]:
    """All clients of the attempt with their rounds on disk; called again they are themselves after a crash."""
    return [
        DurableClient(home / str(i), client.key, attempt.context, (attempt.lanes[i], attempt.scalars[i]))
        for i, client in enumerate(attempt.clients)
    ]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    attempt = Attempt(4, dimension=300_000)  # two chunks
    attempt.clients = durable(tmp_path, attempt)  # type: ignore[assignment]
    return attempt


def test_round_survives_a_crash_before_every_stage(tmp_path: Path, attempt: Attempt) -> None:
    def crash() -> None:
        attempt.clients = durable(tmp_path, attempt)  # type: ignore[assignment]

    adverts = attempt.advertise()
    crash()
    deliveries = attempt.share(adverts)
    crash()
    survivors = attempt.upload(deliveries)
    crash()
    signatures = attempt.confirm(survivors)
    crash()
    assert np.array_equal(attempt.opened(attempt.release(signatures))[0], attempt.plain()[0])
    crash()
    again = attempt.clients[0]
    assert again.advertise() in decode_sequence(adverts, 100)
    assert again.release(signatures) in attempt.transcript
    assert list(again.mask(deliveries[again.me]).chunks()) == attempt.uploads[again.me]


def test_another_message_in_the_same_stage_is_refused_also_after_a_crash(tmp_path: Path, attempt: Attempt) -> None:
    adverts = attempt.advertise()
    deliveries = attempt.share(adverts)
    survivors = attempt.upload(deliveries)
    signatures = attempt.confirm(survivors)
    attempt.release(signatures)
    claim = Survivors.decode(survivors)
    fewer = replace(claim, survivors=claim.survivors[:3], digests=claim.digests[:3]).encode()
    for client in (attempt.clients[0], durable(tmp_path, attempt)[0]):
        for event, other in {
            "share": enc_sequence(decode_sequence(adverts, 100)[:3]),
            "mask": deliveries[attempt.clients[1].me],
            "declare": bytes(32),
            "confirm": fewer,
            "release": enc_sequence(decode_sequence(signatures, 100)[:3]),
        }.items():
            with pytest.raises(SecurityError, match="a second, different message"):
                getattr(client, event)(other)


def retry(tmp_path: Path, attempt: Attempt, context: Context) -> None:
    """Go on with a later attempt: the same sites, another server."""
    attempt.context, attempt.server, first = context, Server(context), attempt.context
    sites = [
        DurableClient(tmp_path / str(i), client.key, context, None, first)
        for i, client in enumerate(attempt.clients)
        if client.me in context.cohort
    ]
    kept = [i for i, client in enumerate(attempt.clients) if client.me in context.cohort]
    attempt.clients = sites  # type: ignore[assignment]
    attempt.lanes, attempt.scalars = [attempt.lanes[i] for i in kept], [attempt.scalars[i] for i in kept]
    attempt.n, attempt.drops = len(kept), {}


@pytest.mark.parametrize("cohort", [4, 3])
def test_second_attempt_sums_the_same_inputs_under_fresh_masks(tmp_path: Path, attempt: Attempt, cohort: int) -> None:
    survivors = attempt.upload(attempt.share(attempt.advertise()))
    attempt.confirm(survivors)
    old = dict(attempt.uploads)
    retry(tmp_path, attempt, attempt.context.retry(2, attempt.context.cohort[:cohort]))
    assert np.array_equal(attempt.run()[0], attempt.plain()[0])
    assert all(attempt.uploads[client.me] != old[client.me] for client in attempt.clients)


def test_attempts_never_both_open(tmp_path: Path, attempt: Attempt) -> None:
    """Whoever released in attempt 1 takes no part in attempt 2, and 2t > n + c leaves too few others."""
    first = attempt.context
    signatures = attempt.confirm(attempt.upload(attempt.share(attempt.advertise())))
    released = attempt.clients[:3]
    for client in released:
        client.release(signatures)
    second = first.retry(2, first.cohort)
    for i, client in enumerate(attempt.clients):
        again = open_attempts(tmp_path / str(i), client.key, first)
        if client in released:
            with pytest.raises(SecurityError, match="after a release"):
                again.join(announcement(second), lambda _: pytest.fail("input made twice"))
        else:
            assert again.join(announcement(second), lambda _: pytest.fail("input made twice"))
    assert 4 - len(released) < second.threshold


def test_attempts_both_open_where_a_release_is_forgotten(tmp_path: Path, attempt: Attempt, monkeypatch) -> None:
    """The attack that the check stops: the difference of two sums is one site's input."""
    monkeypatch.setattr(Attempts, "released", False)
    everyone = attempt.run()[0]
    excluded = attempt.clients[3]
    theirs = attempt.lanes[3]
    retry(tmp_path, attempt, attempt.context.retry(2, tuple(m for m in attempt.context.cohort if m != excluded.me)))
    assert np.array_equal(everyone - attempt.run()[0], theirs)


WRONG_RETRIES = {
    "the same attempt with another cohort": lambda first: replace(first.retry(2, first.cohort[:3]), attempt=1),
    "an attempt above the last possible": lambda first: replace(first, attempt=4),
    "another first cohort, so another threshold": lambda first: replace(
        first, attempt=2, cohort=first.cohort[:3], first_cohort=first.cohort[:3]
    ),
    "another state": lambda first: replace(first, attempt=2, state_hash=bytes(32)),
}


@pytest.mark.parametrize("wrong", WRONG_RETRIES.values(), ids=WRONG_RETRIES.keys())
def test_attempt_that_may_not_follow_is_refused(attempt: Attempt, wrong) -> None:
    attempts = attempt.clients[0].attempts
    attempt.clients[0].advertise()
    with pytest.raises(SecurityError):
        attempts._check_follows(wrong(attempt.context))
    attempts._check_follows(attempt.context.retry(3, attempt.context.cohort))
    with pytest.raises(SecurityError, match="the one before did not"):
        attempt.context.retry(2, attempt.context.cohort[:3]).retry(3, attempt.context.cohort)


def test_announcement_that_leaves_this_site_out_is_refused_and_leaves_no_trace(
    tmp_path: Path, attempt: Attempt
) -> None:
    others = tuple(member for member in attempt.context.cohort if member != attempt.clients[0].me)
    first = attempt.context
    attempt.clients[0].advertise()
    attempts = attempt.clients[0].attempts
    with pytest.raises(SecurityError, match="leaves this site out"):
        attempts.join(announcement(first.retry(2, others)), lambda _: pytest.fail("input made twice"))
    again = open_attempts(tmp_path / "0", attempt.clients[0].key, first)
    assert again.announce == announcement(first)


def test_message_before_any_attempt_is_refused(attempt: Attempt) -> None:
    with pytest.raises(SecurityError, match="before any attempt"):
        attempt.clients[0].share(b"")


def test_input_written_half_is_written_again(tmp_path: Path, attempt: Attempt) -> None:
    """A crash between the input's chunks and the attempt's record: the next process makes the input anew."""
    site = attempt.clients[0].attempts
    half, *_ = site._keep_input(attempt.context, (attempt.lanes[1], attempt.scalars[1]))
    site._file.append(half)
    attempt.clients = durable(tmp_path, attempt)  # type: ignore[assignment]
    assert attempt.clients[0].advertise()
    attempt.clients = durable(tmp_path, attempt)  # type: ignore[assignment]
    assert np.array_equal(attempt.run()[0], attempt.plain()[0])


def test_site_that_lost_its_round_joins_no_attempt_of_it_again(tmp_path: Path, attempt: Attempt) -> None:
    attempt.clients[0].advertise()
    (tmp_path / "0" / "work" / "1.sealed").unlink()
    with pytest.raises(LostRoundError):
        open_attempts(tmp_path / "0", attempt.clients[0].key, attempt.context)
