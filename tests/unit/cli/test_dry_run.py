import subprocess
import sys
from pathlib import Path

import pytest

CLI = [sys.executable, "-m", "mpctf_secure"]
SITE = """
coordinator: 192.0.2.1:8443
model: m
data: d.jsonl
compute:
  launcher: ssh
  ssh: {known_hosts: hosts}
  nodes: [{address: 10.0.0.1, gpus: [0, 1]}, {address: 10.0.0.2, gpus: [0], environment: {NCCL_IB_DISABLE: "1"}}]
"""


def output(*arguments: object) -> str:
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def test_join_shows_the_script_of_every_node_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(SITE)
    shown = output("join", tmp_path / "site.yaml", "--dry-run")
    assert f'UserKnownHostsFile="{tmp_path}/hosts"' in shown
    for part in ("# node 1 of 2, 10.0.0.1", "# node 2 of 2, 10.0.0.2", "CUDA_VISIBLE_DEVICES=0,1", "NCCL_IB_DISABLE=1"):
        assert part in shown
    assert list(tmp_path.iterdir()) == [tmp_path / "site.yaml"]


def test_join_shows_what_sbatch_is_given(tmp_path: Path) -> None:
    slurm = "compute: {launcher: slurm, slurm: {listen: 10.0.0.9, nodes: 2, workers: 4, options: [--time=60]}}"
    (tmp_path / "site.yaml").write_text(SITE.partition("compute:")[0] + slurm)
    shown = output("join", tmp_path / "site.yaml", "--dry-run")
    for part in ("sbatch", "--nodes=2", "--time=60", "agent.tls", "mpctf_secure.training.worker"):
        assert part in shown


@pytest.mark.parametrize("count", [2, 3])
def test_start_shows_the_terms_and_the_scripts_of_local_participants(count: int, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"participants: {{local: {count}, data: 'builtin:intents'}}\nmodel: {{base: x}}\nsecagg: {{allow_pair: true}}\n"
        "training: {bounds: {batch_size: [4, 16]}}\n"
    )
    shown = output("start", tmp_path / "run.yaml", "--dry-run")
    assert "4 to 16" in shown
    assert "aggregation: strategy fedavg, lora both" in shown
    assert shown.count("mpctf_secure.training.worker") == count
    assert list(tmp_path.iterdir()) == [tmp_path / "run.yaml"]
