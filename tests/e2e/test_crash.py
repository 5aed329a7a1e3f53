"""kill -9 at every write of a participant's round file: nothing that may happen once happens twice."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from durable import KilledClient
from simulator import Attempt

from mpctf_secure.hazmat.kdf import sha256

MOST_WRITES = 20
VICTIM = 1
EVENTS = ["advertise", "share", "mask", "declare", "confirm", "release"]


def run_with_kill(home: Path, at: int, when: str) -> tuple[Attempt, KilledClient]:
    attempt = Attempt(4)
    made = attempt.lanes[VICTIM], attempt.scalars[VICTIM]
    client = KilledClient(home, sha256(f"0/{VICTIM}".encode()), attempt.context, made, at, when)
    attempt.clients[VICTIM] = client  # type: ignore[call-overload]
    return attempt, client


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_write_it_repeats_itself_and_the_sum_is_exact(tmp_path: Path, when: str) -> None:
    for at in itertools.count():
        assert at < MOST_WRITES, "it never got through"
        attempt, client = run_with_kill(tmp_path / str(at), at, when)
        try:
            lanes, scalars = attempt.run()
            assert np.array_equal(lanes, attempt.plain()[0])
            assert np.array_equal(scalars, attempt.plain()[1])
            assert [request[0] for request, _ in client.answers] == EVENTS
            if not client.killed:
                break
        finally:
            client.close()
    assert at >= 12
