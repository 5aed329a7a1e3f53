import numpy as np
import pytest

from mpctf_secure.errors import UsageError
from mpctf_secure.monitoring.resources import Resources
from mpctf_secure.rounds.messages import FaultCode
from mpctf_secure.training.launch.job import HeldOut, Job, Trained, _read

NAN, ZEROS = float("nan"), np.zeros(3, np.float32)
DIVERGED = {
    "the loss": Trained(ZEROS, NAN, 1, 1, 1.0),
    "the adapter": Trained(ZEROS + NAN, 1.0, 1, 1, 1.0),
    "the loss on held-out rows": Trained(ZEROS, 1.0, 1, 1, 1.0, HeldOut(1.0, NAN, 1)),
}


@pytest.mark.parametrize("trained", DIVERGED.values(), ids=DIVERGED.keys())
def test_round_that_comes_to_no_number_is_a_fault_and_not_tried_again(trained: Trained) -> None:
    job, faults = object.__new__(Job), []
    job._on_fault = lambda *fault: faults.append(fault)
    with pytest.raises(UsageError, match="not a number") as caught:
        job.check_finite(trained)
    assert "learning_rate" in caught.value.hint
    assert [(fault.code, again) for fault, again in faults] == [(FaultCode.DIVERGED, False)]


def test_sample_of_a_node_with_another_version_is_passed_over() -> None:
    sample = Resources(0.5, 1, 2, 3, 4, 5, 6, ())
    assert _read({"1": sample.to_json().decode(), "2": '{"cpu": 0.5}', "3": "spoilt"}) == {1: sample}
