"""The script for Slurm, run by a shell and the stand-in cluster."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm import Cluster

from mpctf_secure.config.site import Compute, Slurm
from mpctf_secure.training.launch.launchers import launches
from mpctf_secure.training.launch.scripts import CARRIER_FAILED

TORCHRUN = """#!/bin/sh
[ "$1" = -c ] && exec {python} "$@"
env > {folder}/environment-$SLURM_NODEID
trap 'echo ended > {folder}/ended-$SLURM_NODEID; exit 0' TERM
echo "$@" > {folder}/arguments-$SLURM_NODEID
while [ ! -e {folder}/code ]; do sleep 0.1; done
exit $(cat {folder}/code)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(tmp_path / "cluster")
    monkeypatch.setenv("PATH", f"{cluster.path}:{os.environ['PATH']}")
    return cluster


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """In the place of torchrun: says how it was called, and runs until it is told its exit code."""
    path = tmp_path / "it's python"
    path.write_text(TORCHRUN.format(folder=tmp_path, python=shlex.quote(sys.executable)))
    path.chmod(0o700)
    return path


def script_of(folder: Path, python: Path, **section: object) -> str:
    slurm = Slurm.model_validate({"nodes": 2, "listen": "127.0.0.1", **section})
    compute = Compute(launcher="slurm", slurm=slurm, python=python)
    (launch,) = launches(compute, folder / "50% of" / "agent.tls", 0)
    assert launch.argv == ["sh", "-s"]
    return launch.script


def begin(script: str, folder: Path) -> subprocess.Popen[str]:
    (folder / "50% of").mkdir(exist_ok=True)
    child = subprocess.Popen(
        ["sh", "-s"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdin
    child.stdin.write(script)
    child.stdin.flush()
    return child


def end(child: subprocess.Popen[str]) -> int:
    for stream in (child.stdin, child.stderr):
        assert stream
        stream.close()
    return child.wait()


def until(path: Path) -> str:
    while not path.exists() or not path.read_text().endswith("\n"):
        pass
    return path.read_text()


def test_script_comes_of_the_section_alone_and_nothing_is_written(tmp_path: Path, python: Path) -> None:
    before = sorted(tmp_path.iterdir())
    script = script_of(tmp_path, python, options=["--partition=gpu", "-t 4:00:00"], workers=4)
    assert sorted(tmp_path.iterdir()) == before
    lines = script.splitlines()
    assert lines[lines.index("#!/bin/sh") + 1 :][:2] == ["#SBATCH --partition=gpu", "#SBATCH -t 4:00:00"]
    for part in ("--nodes=2", "--ntasks-per-node=1", "--no-requeue", "50%% of/worker-1.log", "--nproc-per-node=4"):
        assert part in script


def test_each_node_has_its_part_of_the_job_and_only_the_first_the_ticket(
    tmp_path: Path, python: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")  # as Slurm grants them
    odd = "two words, a 'quote', $HOME and `date`\nand a line"
    child = begin(script_of(tmp_path, python, environment={"ODD": odd, "OMP_NUM_THREADS": "3"}), tmp_path)
    first, second = (until(tmp_path / f"arguments-{node}") for node in (0, 1))
    for arguments in (first, second):
        assert "--rdzv-endpoint=[127.0.0.1]:29400" in arguments
    assert "--nnodes=2 --node-rank=0 --nproc-per-node=1" in first
    assert "--nnodes=2 --node-rank=1 --nproc-per-node=1" in second
    assert first.endswith(f" -m mpctf_secure.training.worker 1 - {tmp_path}/50% of/agent.tls\n")
    assert second.endswith(" -m mpctf_secure.training.worker 2 -\n")
    for node in (0, 1):
        environment = (tmp_path / f"environment-{node}").read_text()
        assert f"\nODD={odd}\n" in environment
        for line in ("CUDA_VISIBLE_DEVICES=5,7", "OMP_NUM_THREADS=3", "HF_HUB_OFFLINE=1"):
            assert f"\n{line}\n" in f"\n{environment}"
    (tmp_path / "code").write_text("0")
    assert child.wait() == 0
    end(child)


def test_exit_code_of_the_job_is_that_of_the_script(tmp_path: Path, python: Path, cluster: Cluster) -> None:
    (tmp_path / "code").write_text("7")
    child = begin(script_of(tmp_path, python, nodes=1), tmp_path)
    assert child.wait() == 7
    end(child)


def test_job_that_waits_or_runs_is_cancelled_when_whoever_started_it_is_gone(
    tmp_path: Path, python: Path, cluster: Cluster
) -> None:
    cluster.closed.touch()
    waiting = begin(script_of(tmp_path, python), tmp_path)
    while not cluster.jobs():
        pass
    end(waiting)
    assert not (tmp_path / "arguments-0").exists()
    cluster.closed.unlink()
    running = begin(script_of(tmp_path, python), tmp_path)
    until(tmp_path / "arguments-1")
    end(running)
    assert until(tmp_path / "ended-0") == until(tmp_path / "ended-1") == "ended\n"
    while cluster.jobs():
        pass


def test_job_is_cancelled_when_its_shell_and_sbatch_are_told_to_end(
    tmp_path: Path, python: Path, cluster: Cluster
) -> None:
    child = begin(script_of(tmp_path, python), tmp_path)
    until(tmp_path / "arguments-1")
    os.killpg(child.pid, signal.SIGTERM)
    child.wait()
    assert until(tmp_path / "ended-0") == until(tmp_path / "ended-1") == "ended\n"
    end(child)
    while cluster.jobs():
        pass


def test_job_that_slurm_does_not_take_has_an_exit_code_of_its_own(
    tmp_path: Path, python: Path, cluster: Cluster
) -> None:
    child = begin(script_of(tmp_path, python, options=["--partition=none"]), tmp_path)
    assert child.wait() == CARRIER_FAILED
    assert child.stderr
    assert "Invalid partition" in child.stderr.read().splitlines()[-1]
    end(child)


def test_machine_without_slurm_is_told_like_a_job_that_is_not_taken(tmp_path: Path, python: Path) -> None:
    child = begin(script_of(tmp_path, python), tmp_path)
    assert child.wait() == CARRIER_FAILED
    assert child.stderr
    assert "sbatch: not found" in child.stderr.read().splitlines()[-1]
    end(child)
