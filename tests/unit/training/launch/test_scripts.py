import signal
import subprocess
from pathlib import Path

import pytest

from mpctf_secure.config.site import Compute, Node, Ssh
from mpctf_secure.training.launch import scripts
from mpctf_secure.training.launch.launchers import launches
from mpctf_secure.training.launch.scripts import Rendezvous, node_script

ALONE = Rendezvous("cafe", 1, 1, "")
FAKE = """#!/bin/sh
env > {folder}/environment
echo "$@" > {folder}/arguments
trap 'echo ended > {folder}/ended; exit 0' TERM
echo $$ > {folder}/pid
while :; do sleep 0.1; done
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """In the place of torchrun: says how it was called, and runs until it is told to end."""
    path = tmp_path / "it's python"
    path.write_text(FAKE.format(folder=tmp_path))
    path.chmod(0o700)
    return path


def until(path: Path) -> str:
    while not path.exists() or not path.read_text().endswith("\n"):
        pass
    return path.read_text()


def begin(script: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(["sh", "-s"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin
    child.stdin.write(script)
    child.stdin.flush()
    return child


def test_job_has_its_nodes_environment_and_ends_when_its_starter_does(python: Path, tmp_path: Path) -> None:
    odd = "two words, a 'quote', $HOME and `date`"
    node = Node(address="192.0.2.2", gpus=(0, 3), environment={"NCCL_IB_DISABLE": "1", "ODD": odd})
    meeting = Rendezvous("cafe", 2, 2, "192.0.2.1:29400")
    script = node_script(2, node, meeting, str(python), str(tmp_path / "job.sock"))
    (tmp_path / "job.sock").touch()
    child = begin(script)
    until(tmp_path / "pid")
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line
    )
    assert environment["ODD"] == odd
    assert (environment["NCCL_IB_DISABLE"], environment["CUDA_VISIBLE_DEVICES"]) == ("1", "0,3")
    assert environment["HF_HUB_OFFLINE"] == "1"
    arguments = (tmp_path / "arguments").read_text()
    for part in ("--nnodes=2 --node-rank=1 --nproc-per-node=2", "--rdzv-id=cafe", "--rdzv-endpoint=192.0.2.1:29400"):
        assert part in arguments
    assert arguments.rstrip().endswith(f"-m mpctf_secure.training.worker 2 0,3 {tmp_path}/job.sock")
    assert child.stdin
    child.stdin.close()
    assert child.wait() == 0
    assert until(tmp_path / "ended") == "ended\n"
    assert not (tmp_path / "job.sock").exists()


def test_job_ends_with_its_shell(python: Path, tmp_path: Path) -> None:
    child = begin(node_script(1, Node(), ALONE, str(python), None))
    until(tmp_path / "pid")
    child.terminate()
    child.wait()
    assert until(tmp_path / "ended") == "ended\n"


def test_job_that_does_not_listen_is_killed_when_its_starter_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "_GRACE_SECONDS", 0)
    stubborn = tmp_path / "python"
    stubborn.write_text(f"#!/bin/sh\ntrap '' TERM\necho $$ > {tmp_path}/pid\nwhile :; do sleep 0.1; done\n")
    stubborn.chmod(0o700)
    child = begin(node_script(1, Node(), ALONE, str(stubborn), None))
    until(tmp_path / "pid")
    assert child.stdin
    child.stdin.close()
    assert child.wait() == 128 + signal.SIGKILL


def test_exit_code_of_the_job_is_that_of_the_script(tmp_path: Path) -> None:
    child = begin(node_script(1, Node(), ALONE, "false", None))
    assert child.wait() == 1


def test_threads_are_what_there_is_divided_by_the_processes_unless_somebody_said(python: Path, tmp_path: Path) -> None:
    child = begin(node_script(1, Node(environment={"OMP_NUM_THREADS": "7"}), ALONE, str(python), None))
    until(tmp_path / "pid")
    assert "OMP_NUM_THREADS=7\n" in (tmp_path / "environment").read_text()
    child.terminate()
    child.wait()


def test_one_process_needs_no_torchrun_and_several_on_a_node_meet_in_a_file() -> None:
    """What torchrun listens for, others may answer."""
    alone, two = (node_script(1, Node(processes=n), Rendezvous("cafe", 1, n, ""), "python", None) for n in (1, 2))
    assert "torch.distributed.run" not in alone
    assert '--rdzv-conf=store_type=file --rdzv-endpoint="$logs/meeting"' in two


GPUS = {
    "all that are here where nothing is said": (Node(), 4, "0,1,2,3", 4),
    "those that are named": (Node(gpus=(2,)), 4, "2", 1),
    "none where processes are counted": (Node(processes=2), 4, "", 2),
    "none where there are none": (Node(), 0, "", 1),
}


@pytest.mark.parametrize(("node", "here", "shown", "processes"), GPUS.values(), ids=GPUS.keys())
def test_gpus_of_a_local_job(node: Node, here: int, shown: str, processes: int) -> None:
    (launch,) = launches(Compute(nodes=(node,)), Path("/tmp/job.sock"), here)  # noqa: S108
    assert f"export CUDA_VISIBLE_DEVICES={shown}" in launch.script.replace("''", "").splitlines()
    assert (f"--nproc-per-node={processes} " in launch.script) == (processes > 1)


def test_ssh_takes_pinned_host_keys_only_and_the_first_node_gets_the_socket() -> None:
    keys = Ssh(known_hosts=Path("/site/known_hosts"), identity=Path("/site/key"))
    nodes = (Node(address="192.0.2.1", gpus=(0,)), Node(address="192.0.2.2", gpus=(0, 1), user="ml", port=2222))
    first, second = launches(Compute(launcher="ssh", ssh=keys, nodes=nodes), Path("/run/job.sock"), 0)
    for launch in (first, second):
        line = " ".join(launch.argv)
        for option in ("StrictHostKeyChecking=yes", 'UserKnownHostsFile="/site/known_hosts"', "BatchMode=yes"):
            assert option in line
        assert "--rdzv-backend=static" in launch.script
        assert "--rdzv-endpoint='[192.0.2.1]:29400'" in launch.script
    assert any(part.endswith(":/run/job.sock") for part in first.argv)
    assert "-R" not in second.argv
    assert second.argv[-3:] == ["192.0.2.2", "sh", "-s"]
    assert tuple(second.argv[second.argv.index("-l") :][:2]) == ("-l", "ml")
    assert "mpctf_secure.training.worker 2 0,1" in second.script
