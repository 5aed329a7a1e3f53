"""A participant is killed between key sharing and masked input: the round finishes with the sum of the others."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from e2e.harness import RealRun, published

from mpctf_secure.coordinator import reception
from mpctf_secure.identity.roster import Member

VICTIM = "site-3"


def kill_victim(run: RealRun, peer: Member) -> None:
    """Called when an upload begins, so its sender has shared its keys; the victim's bytes never get in."""
    if peer.name == VICTIM:
        os.kill(run.processes[VICTIM].pid, signal.SIGKILL)
        run.processes[VICTIM].wait()
        raise ConnectionError("its process is gone")


def test_round_finishes_with_the_exact_sum_of_the_other_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reception, "_PRESENT_SECONDS", 5.0)  # of the minute in which one who was heard may come back
    run = RealRun(tmp_path, ["rounds=2", "timeouts.stage=8", "timeouts.training=20"], monkeypatch)
    outcome = run.run(killable=VICTIM, interfere=kill_victim)
    first, second = outcome.coordinator.ledger.rounds
    others = ["site-1", "site-2", "site-4"]
    assert len(first.cohort) == 4
    assert first.survivors == others
    assert [(d["participant"], d["stage"]) for d in first.dropouts][:1] == [(VICTIM, "masked input")]
    lanes, scalars = published(outcome, 1, first.ring_bits)
    given = [outcome.inputs[name, 1] for name in others]
    assert np.array_equal(lanes, np.sum([one.lanes for one in given], axis=0, dtype=lanes.dtype))
    assert np.array_equal(scalars, np.sum([one.scalars for one in given], axis=0, dtype=scalars.dtype))
    assert second.cohort == second.survivors == others
