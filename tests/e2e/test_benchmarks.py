"""Benchmarks that run the program's own code must still run; their figures are no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "secagg_round.py"


@pytest.mark.parametrize("mode", ["secure", "clear"])
def test_the_round_benchmark_finishes_its_rounds(mode: str) -> None:
    argv = [sys.executable, str(SCRIPT), mode, str(1 << 16), "3", "2"]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, timeout=120)
    found = json.loads(done.stdout)
    assert [record["seconds"]["masked input"] > 0 for record in found["rounds"]] == [True, True]
    assert found["memory"] > 1 << 20
