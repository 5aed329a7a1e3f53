"""A participant's training job on several processes and nodes, through real torchrun and sshd and a stand-in Slurm."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from e2e import sshd
from e2e.consortium import COORDINATOR, FOUR, THREE, consortium, processes_of, workers_of
from slurm import Cluster

from mpctf_secure import files
from mpctf_secure.aggregation.lora import initial_adapter
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute, Node, SiteConfig, Slurm, Ssh
from mpctf_secure.config.strategies import FedAvg
from mpctf_secure.config.training import Training
from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.experiments.intents import write_intents
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.monitoring.resources import Resources
from mpctf_secure.rounds.messages import FaultCode
from mpctf_secure.training.faults import Fault
from mpctf_secure.training.launch import job as job_module
from mpctf_secure.training.launch.job import Job, Trained
from mpctf_secure.training.launch.running import Running
from mpctf_secure.training.model_hash import hash_model
from mpctf_secure.training.spec import JobSpec

ROWS = list(range(30))
ONE = Compute(precision="float32")
TERMS = Training(batch_size=8, max_length=128, learning_rate=1e-3)
BEST = TERMS.model_copy(update={"learning_rate": 0.03, "validation": 0.25, "send": "best"})
"""Thirty rows are left, and the third of four steps is the best."""


class Site:
    """A model and rows; jobs on them by their `compute` section."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_intents(folder, ["a", "b"], 40, 24, 0)
        write_tiny_llama(folder / "model", (folder / "a.jsonl").read_text().splitlines())
        self.faults: list[tuple[Fault, bool]] = []
        self.uses: dict[int, Resources] = {}

    def job(self, compute: Compute, name: str = "work", terms: Training = TERMS) -> Job:
        work = self.folder / name
        work.mkdir(exist_ok=True)
        model, data = self.folder / "model", self.folder / "a.jsonl"
        site = SiteConfig(coordinator="127.0.0.1:1", model=model, data=data, work=work, compute=compute)
        spec = JobSpec.of(site, (hash_model(model).whole, files.digest(data)), Lora(r=4), terms, FedAvg())
        job = Job(spec, site, lambda *fault: self.faults.append(fault), self.uses.update)
        self.schema = job.schema
        return job

    def trained(self, compute: Compute, name: str = "work", terms: Training = TERMS) -> Trained:
        job = self.job(compute, name, terms)
        try:
            return train(job)
        finally:
            job.close()


def train(job: Job) -> Trained:
    return job.train(initial_adapter(job.schema, 0), ROWS, [name for name, _ in job.schema], lambda *_: None)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(autouse=True)
def no_faults_yet(site: Site) -> None:
    site.faults.clear()


@pytest.fixture(scope="module")
def alone(site: Site) -> Trained:
    """What one process makes of the same global batches."""
    return site.trained(ONE)


@pytest.fixture(scope="module")
def chosen_alone(site: Site) -> Trained:
    """What one process sends of several adapters."""
    return site.trained(ONE, terms=BEST)


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    if sshd.SSHD is None:
        pytest.skip("needs sshd")
    with sshd.running(tmp_path / "ssh") as port:
        yield port


def over_ssh(folder: Path, port: int, processes: int = 2) -> Compute:
    keys = Ssh(known_hosts=folder / "ssh" / "known_hosts", identity=folder / "ssh" / "user_key")
    nodes = tuple(
        Node(address=address, port=port, processes=processes, environment={"GLOO_SOCKET_IFNAME": "lo"})
        for address in sshd.ADDRESSES
    )
    return ONE.model_copy(update={"launcher": "ssh", "ssh": keys, "nodes": nodes, "rendezvous_port": sshd.free_port()})


def check_same(site: Site, trained: Trained, alone: Trained) -> None:
    assert (trained.rows, trained.tokens) == (alone.rows, alone.tokens)
    assert trained.loss == pytest.approx(alone.loss, rel=1e-5)
    assert np.abs(trained.adapter - alone.adapter).max() < 1e-5
    assert np.abs(alone.adapter - initial_adapter(site.schema, 0)).max() > 1e-3
    assert site.faults == []


def test_two_nodes_over_ssh_with_two_processes_each_train_like_one_process(
    site: Site, alone: Trained, port: int, tmp_path: Path
) -> None:
    site.uses.clear()
    job = site.job(over_ssh(tmp_path, port), "ssh")
    try:
        check_same(site, train(job), alone)
        for _ in range(30):
            if site.uses.keys() == {1, 2}:
                break
            train(job)
    finally:
        job.close()
    assert site.uses.keys() == {1, 2}  # nodes that are looked at while they train
    assert not list(Path("/tmp").glob("mpctf-*.sock"))  # noqa: S108
    assert not processes_of(site.folder)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(tmp_path / "cluster")
    monkeypatch.setenv("PATH", f"{cluster.path}:{os.environ['PATH']}")
    return cluster


def under_slurm(nodes: int, *options: str) -> Compute:
    section = Slurm(nodes=nodes, listen="127.0.0.1", options=options, environment={"GLOO_SOCKET_IFNAME": "lo"})
    return ONE.model_copy(update={"launcher": "slurm", "slurm": section, "rendezvous_port": sshd.free_port()})


def test_two_nodes_under_slurm_train_like_one_process(site: Site, alone: Trained, cluster: Cluster) -> None:
    check_same(site, site.trained(under_slurm(2), "slurm"), alone)
    assert [path.name for path in (site.folder / "slurm").iterdir()] == ["worker-1.log"]
    assert not cluster.jobs()
    assert not processes_of(site.folder)


@pytest.mark.slow
def test_job_that_slurm_ends_is_started_again_with_the_rounds_inputs(
    site: Site, alone: Trained, cluster: Cluster
) -> None:
    job = site.job(under_slurm(1), "cancelled")
    try:
        cluster.cancel()
        trained = train(job)
    finally:
        job.close()
    assert [(fault.code, again) for fault, again in site.faults] == [(FaultCode.KILLED, True)]
    assert np.array_equal(trained.adapter, alone.adapter)
    assert not cluster.jobs()


def test_job_that_waits_in_the_queue_is_cancelled_when_its_agent_is_interrupted(
    site: Site, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.closed.touch()
    seen = []

    def interrupt(running: Running) -> None:
        if jobs := cluster.jobs():
            seen.extend(jobs)
            raise KeyboardInterrupt

    monkeypatch.setattr(Running, "_check_running", interrupt)
    with pytest.raises(KeyboardInterrupt):
        site.job(under_slurm(2), "interrupted")
    assert len(seen) == 1
    while cluster.jobs():
        pass
    assert [path.name for path in (site.folder / "interrupted").iterdir()] == ["worker-1.log"]


@pytest.mark.parametrize(("installed", "text"), [(True, "sbatch: error: .*Invalid partition"), (False, "not found")])
def test_job_that_slurm_does_not_take_says_why(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, text: str
) -> None:
    if installed:
        monkeypatch.setenv("PATH", f"{Cluster(tmp_path / 'cluster').path}:{os.environ['PATH']}")
    with pytest.raises(EnvironmentUnfitError, match=text) as caught:
        site.trained(under_slurm(2, "--partition=none"), "refused")
    assert [(fault.code, fault.node, again) for fault, again in site.faults] == [(FaultCode.UNREACHABLE, 1, False)]
    assert (caught.value.exit_code, "worker-1.log" in caught.value.hint) == (3, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "compute",
    [
        Compute(precision="float32", nodes=(Node(processes=2),)),
        Compute(precision="float32", nodes=(Node(processes=3),), micro_batch=1, gradient_checkpointing=True),
        Compute(precision="float32", nodes=(Node(processes=2),), sharded=True),
        Compute(
            precision="float32", nodes=(Node(processes=2),), sharded=True, micro_batch=3, gradient_checkpointing=True
        ),
    ],
    ids=["two processes", "three, row by row, checkpointed", "sharded", "sharded, in micro-batches"],
)
def test_processes_however_they_share_the_work_train_like_one(site: Site, alone: Trained, compute: Compute) -> None:
    check_same(site, site.trained(compute), alone)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_processes_send_the_best_adapter_that_one_process_would(
    site: Site, chosen_alone: Trained, sharded: bool
) -> None:
    nodes = (Node(processes=2),)
    chosen = site.trained(ONE.model_copy(update={"nodes": nodes, "sharded": sharded}), terms=BEST)
    assert chosen.held_out
    assert chosen_alone.held_out
    assert chosen.held_out.sent_step == chosen_alone.held_out.sent_step == 3
    assert asdict(chosen.held_out) == pytest.approx(asdict(chosen_alone.held_out), rel=1e-5)
    check_same(site, chosen, chosen_alone)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, FaultCode.KILLED), (signal.SIGSTOP, FaultCode.HANG)])
def test_job_whose_worker_dies_or_hangs_is_started_again_with_the_rounds_inputs(
    site: Site, alone: Trained, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, code: FaultCode
) -> None:
    job = site.job(ONE)
    monkeypatch.setattr(job_module, "FIRST_STEP_SECONDS", 10.0)
    try:
        first = workers(job)
        for worker in first:
            os.kill(worker, signum)
        trained = train(job)
    finally:
        job.close()
    assert first
    assert not any(map(psutil.pid_exists, first))
    assert [(fault.code, again) for fault, again in site.faults] == [(code, True)]
    assert np.array_equal(trained.adapter, alone.adapter)


@pytest.mark.slow
def test_one_of_two_processes_that_is_killed_is_named_and_not_the_one_that_lost_it(site: Site, alone: Trained) -> None:
    job = site.job(ONE.model_copy(update={"nodes": (Node(processes=2),)}), "killed")
    ranks = {int(psutil.Process(pid).environ()["RANK"]): pid for pid in workers(job)}

    def kill(step: int, _: int) -> None:
        if step == 2 and not site.faults:
            os.kill(ranks[1], signal.SIGKILL)

    try:
        names = [name for name, _ in job.schema]
        trained = job.train(initial_adapter(job.schema, 0), ROWS, names, kill)
    finally:
        job.close()
    assert [(fault.code, fault.rank, again) for fault, again in site.faults] == [(FaultCode.KILLED, 1, True)]
    site.faults.clear()
    check_same(site, trained, alone)


def workers(job: Job) -> list[int]:
    assert job._running
    return [worker for process in job._running._processes for worker in workers_of(process.pid)]


def no_such_gpu(site: Site, port: int, folder: Path) -> Compute:
    return ONE.model_copy(update={"nodes": (Node(gpus=(0, 63)),)})


def nobody_listens(site: Site, port: int, folder: Path) -> Compute:
    compute = over_ssh(folder, port, 1)
    return compute.model_copy(update={"nodes": (compute.nodes[0], compute.nodes[1].model_copy(update={"port": 9}))})


def another_host_key(site: Site, port: int, folder: Path) -> Compute:
    known = folder / "ssh" / "known_hosts"
    other = (folder / "ssh" / "user_key.pub").read_text()
    known.write_text(known.read_text().splitlines(keepends=True)[0] + f"[127.0.0.2]:{port} {other}")
    return over_ssh(folder, port, 1)


FAULTS = {
    "a GPU index that does not exist": (no_such_gpu, FaultCode.NO_GPU, 1, "no GPU 0"),
    "a node where nobody listens": (nobody_listens, FaultCode.UNREACHABLE, 2, "refused"),
    "a node with another host key": (another_host_key, FaultCode.UNREACHABLE, 2, "verification failed"),
}


@pytest.mark.parametrize(("spoil", "code", "node", "text"), FAULTS.values(), ids=FAULTS.keys())
def test_job_that_cannot_start_says_what_is_wrong_on_which_node(
    site: Site, port: int, tmp_path: Path, spoil: Any, code: FaultCode, node: int, text: str
) -> None:
    with pytest.raises(EnvironmentUnfitError, match=text) as caught:
        site.trained(spoil(site, port, tmp_path), "faults")
    assert [(fault.code, fault.node, again) for fault, again in site.faults] == [(code, node, False)]
    assert caught.value.hint
    assert not processes_of(site.folder)


@pytest.mark.slow
def test_job_that_fails_for_good_is_told_to_the_coordinator_and_the_round_goes_on_without_that_site(
    tmp_path: Path,
) -> None:
    """The data file is another one than that with which the site accepted the contract, when its job starts again."""
    training = {"learning_rate": 3e-3, "max_length": 128, "bounds": {"batch_size": [4, 16]}}
    with consortium(tmp_path / "joint", FOUR, rounds=2, training=training) as joint:
        joint.write_site("insurer-d", joint.address, training={"batch_size": 4})
        joint.begin()
        joint.wait_for_event("contract_accepted")
        data = joint.root / "data" / "insurer-d.jsonl"
        old = data.read_bytes()
        data.write_bytes(b"".join(reversed(old.splitlines(keepends=True))))
        for worker in workers_of(joint.processes["insurer-d"].pid):
            os.kill(worker, signal.SIGKILL)
        joint.end("insurer-d", 2)
        joint.end(COORDINATOR, 0)
        failed = [event for event in joint.events() if event["event"] == "training_failed"]
        assert [(e["participant"], e["code"], e["again"]) for e in failed] == [
            ("insurer-d", "killed", True), ("insurer-d", "bad_data", False),
        ]  # fmt: skip
        assert "changed since this site joined the run" in joint.log("insurer-d")
        assert str(data) not in json.dumps(failed)
        rounds = joint.report()["rounds"]
        assert [len(record["survivors"]) for record in rounds][-1] == 3
        assert "bad_data" in json.dumps(rounds)
        joint.serve_the_end()
        joint.site("insurer-d", once=True)
        joint.end("insurer-d", 2)
        assert "data: the file has changed since this site accepted the run" in joint.log("insurer-d")
        table = [line.split() for line in joint.log(COORDINATOR).splitlines() if line.startswith("│")]
        assert ["│", "insurer-d", "│", "0.003", "│", "4", "│", "1", "│", "128", "│"] in table
        data.write_bytes(old)
        joint.write_site("insurer-d", joint.address, training={"batch_size": 16})
        joint.site("insurer-d", once=True)
        joint.end("insurer-d", 2)
        assert "it has changed since this site accepted the run" in joint.log("insurer-d")


NO_GPU = "its training job does not start: no_gpu, node 1, rank 0"
UNFIT = {
    "a GPU that is not there": ({"compute": {"nodes": [{"gpus": [63]}]}}, 3, NO_GPU),
    "a setting out of bounds": ({"training": {"batch_size": 64}}, 2, "training.batch_size: 64 in the site file"),
}


@pytest.mark.parametrize(("settings", "code", "reason"), UNFIT.values(), ids=UNFIT.keys())
def test_run_that_a_site_is_not_fit_for_ends_at_both_ends_with_the_reason(
    tmp_path: Path, settings: dict[str, Any], code: int, reason: str
) -> None:
    with consortium(tmp_path / "joint", THREE) as joint:
        joint.write_site("bank-b", joint.address, **settings)
        joint.coordinator()
        joint.site("bank-b", once=True)
        joint.end("bank-b", code)
        joint.end(COORDINATOR, 5)
        assert f"bank-b refuses: {reason}" in joint.log(COORDINATOR)
