import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpctf_secure.errors import EnvironmentUnfitError, UsageError
from mpctf_secure.rounds.messages import FaultCode
from mpctf_secure.training import faults
from mpctf_secure.training.faults import Fault


def test_last_words_are_read_from_where_the_job_began(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    faults.tell(Fault(FaultCode.OUT_OF_MEMORY, 2, 5, "out of memory\nwith 8 rows", "fewer"))
    words = capfd.readouterr().err
    log = tmp_path / "worker.log"
    log.write_text(f"{words}noise\n")
    start = log.stat().st_size
    log.write_text(f"{words}noise\nTraceback …\n{words}more noise")
    assert list(faults.read(log, start)) == [
        Fault(FaultCode.OUT_OF_MEMORY, 2, 5, "out of memory\nwith 8 rows", "fewer")
    ]


SUMMARY = """\
mpctf_secure.training.worker FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2027-01-01_00:00:00
  host      : node
  rank      : 2 (local_rank: 2)
  exitcode  : -9 (pid: 103)
[2]:
  rank      : 3 (local_rank: 3)
  exitcode  : -15 (pid: 104)
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 101)
"""


def test_torchrun_says_which_process_was_killed(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text(SUMMARY.replace("-9", "-7"))
    start = log.stat().st_size
    log.write_text(SUMMARY.replace("-9", "-7") + SUMMARY)
    assert list(faults.read_signals(log, start)) == [(2, 9)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200) | st.recursive(st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_anything_else_in_a_log_is_passed_over(tmp_path: Path, noise: bytes) -> None:
    log = tmp_path / "worker.log"
    log.write_bytes(b"mpctf-fault " + noise + b"\n")
    assert list(faults.read(log, 0)) == []


@pytest.mark.parametrize(
    ("code", "kind"), [(FaultCode.BAD_DATA, UsageError), (FaultCode.NO_GPU, EnvironmentUnfitError)]
)
def test_bad_data_is_the_users_mistake_and_the_rest_the_machines(code: FaultCode, kind: type[Exception]) -> None:
    error = Fault(code, 2, 3, "what", "how").to_error()
    assert type(error) is kind
    assert (error.message, error.hint) == ("what (node 2, rank 3)", "how")
