import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mpctf_secure.rounds.messages import FaultCode
from mpctf_secure.training.launch import endpoint, running
from mpctf_secure.training.launch.launchers import Launch
from mpctf_secure.training.launch.running import JobFailedError, Running

SILENT = "import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); time.sleep(60)"


def silent(path: Path) -> list[Launch]:
    """A process that says nothing and takes nothing, as one that hangs between two rounds."""
    return [Launch(1, [sys.executable, "-c", SILENT, str(path)], "", "sh")]


def test_process_that_hangs_between_rounds_and_takes_no_adapter_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_TRANSFER_SECONDS", 0.5)
    job = Running(silent, endpoint.unix(), tmp_path)
    began = time.monotonic()
    with pytest.raises(JobFailedError) as caught:
        job.send({"rows": []}, np.zeros(1_000_000, np.float32))
    assert caught.value.fault.code == FaultCode.HANG
    assert "worker-1.log" in caught.value.fault.hint
    assert time.monotonic() - began < 30
    assert all(process.poll() is not None for process in job._processes)


def test_silence_beyond_the_limit_is_a_fault(tmp_path: Path) -> None:
    job = Running(silent, endpoint.unix(), tmp_path)
    with pytest.raises(JobFailedError, match="has said nothing for 1 s"):
        job.receive(1.0)


def test_log_of_a_job_is_its_owners_alone(tmp_path: Path) -> None:
    job = Running(silent, endpoint.unix(), tmp_path)
    job.close()
    assert (tmp_path / "worker-1.log").stat().st_mode & 0o777 == 0o600
