"""Benchmarks that run the program's own code must still run; their figures are no test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("mode", ["secure", pytest.param("clear", marks=pytest.mark.slow)])
def test_the_round_benchmark_finishes_its_rounds(mode: str) -> None:
    argv = [sys.executable, str(FOLDER / "secagg_round.py"), mode, str(1 << 16), "3", "2"]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, timeout=120)
    found = json.loads(done.stdout)
    assert [record["seconds"]["masked input"] > 0 for record in found["rounds"]] == [True, True]
    assert found["memory"] > 1 << 20


def test_the_benchmark_of_the_audit_log_compares_it_with_disk_and_hashes(tmp_path: Path) -> None:
    argv = [sys.executable, str(FOLDER / "auditlog.py"), "200", "1000"]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert done.stdout.count(": × ") == 2
    assert "of 1000 leaves: inclusion 10 hashes, consistency 11" in done.stdout


@pytest.mark.slow
def test_the_audit_of_one_run_finds_no_more_than_is_claimed() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "audit.py")], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.count("claims epsilon 3, one run shows ") == 2


@pytest.mark.slow
def test_the_training_benchmark_finds_both_sides_to_compute_the_same_and_compares_them(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: make bench-training does it")
    argv = [sys.executable, str(FOLDER / "training.py"), "--batches", "1"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(argv, env=environment, check=False, stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == int("MISSED" in done.stdout)
    assert [line.count(" tokens | ") for line in done.stdout.splitlines()[-2:]] == [1, 1]
