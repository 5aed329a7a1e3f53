"""DP-SGD in real jobs: what leaves a site, what it is charged, and that nothing is drawn twice."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from e2e.consortium import workers_of
from e2e.harness import SMOKE, Outcome, RealRun
from e2e.test_start import run_cli

from mpctf_secure import files
from mpctf_secure.aggregation.lora import initial_adapter
from mpctf_secure.config.privacy import RecordDpSgd
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute, Node, Policy, SiteConfig
from mpctf_secure.config.strategies import FedAvg
from mpctf_secure.config.training import Training
from mpctf_secure.experiments.intents import write_intents
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.privacy.accountant import Release, cost_of_integers
from mpctf_secure.privacy.ledger import Ledger
from mpctf_secure.privacy.records import Samples
from mpctf_secure.secagg.codec import SCALAR_NAMES
from mpctf_secure.training.launch.job import Job
from mpctf_secure.training.model_hash import hash_model
from mpctf_secure.training.spec import JobSpec

STRICT = "site-1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RealRun:
    dpsgd = "privacy={strategy: none, record_dpsgd: {epsilon: 8}}"
    with pytest.MonkeyPatch.context() as patch:
        made = RealRun(tmp_path_factory.mktemp("run"), [dpsgd, "training.batch_size=16", "participants.local=3"], patch)
        made.policies[STRICT] = Policy(record_epsilon=2.0)
        made.outcome = made.run()
    return made


@pytest.fixture
def outcome(made: RealRun) -> Outcome:
    return made.outcome


def test_coordinator_hears_nothing_of_training_but_the_update(outcome: Outcome) -> None:
    for given in outcome.inputs.values():
        rows, loss, _ = given.scalars[: len(SCALAR_NAMES)]
        assert (rows, loss) == (outcome.contract.data.size, 0)
    received = b"".join(outcome.recorder.received)
    assert b"ready" in received
    assert not any(label in received for label in (b"progress", b"resources"))
    for record in outcome.coordinator.ledger.rounds:
        shown = record.to_dict()
        assert (shown["rows"], shown["mean_loss"], shown["validation_loss_before"]) == (None, None, None)
        assert len(record.survivors) == 3
    assert outcome.state.adapter.any()


def test_every_site_has_charged_the_noise_that_its_rows_need(made: RealRun) -> None:
    for name in made.config.participants.names:
        site = made.site(name, "127.0.0.1:1")
        charges = Ledger(site.keys).charges()
        assert [charge.round for charge in charges] == [1, 2]
        rows = len(site.data.read_text().splitlines())
        assert {charge.dpsgd.sampling_rate for charge in charges} == {16 / rows}
        assert {charge.dpsgd.steps for charge in charges} == {2}
        spent = cost_of_integers([charge.dpsgd for charge in charges], 1e-5).epsilon
        target = 2.0 if name == STRICT else 8.0
        assert 0.97 * target < spent <= target


@pytest.mark.slow
def test_noise_on_records_stands_beside_noise_on_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And beside factors that move in turn."""
    both = "privacy={strategy: client_fixed, noise_multiplier: 1.0, clip_norm: 0.5, record_dpsgd: {epsilon: 8}}"
    made = RealRun(tmp_path, [both, "aggregation.lora=alternating"], monkeypatch)
    outcome = made.run()
    for name in made.config.participants.names:
        for charge in Ledger(made.site(name, "127.0.0.1:1").keys).charges():
            assert charge.dpsgd
            assert (charge.noise_multiplier, charge.against) == (1.0, "coordinator")
    sizes = [given.update.size for (name, _), given in sorted(outcome.inputs.items()) if name == STRICT]
    assert sum(sizes) == outcome.state.adapter.size
    assert all(given.update.any() and given.scalars.size == 1 for given in outcome.inputs.values())


def test_site_itself_knows_how_it_went(made: RealRun) -> None:
    events = (made.folder / "sites" / STRICT / "work" / "events.jsonl").read_text().splitlines()
    trained = [event for event in map(json.loads, events) if event["event"] == "round_trained"]
    assert all(15 < event["rows"] < 55 for event in trained)  # 32 are expected in two steps
    assert len(trained) == 2
    assert all(1 < event["loss"] < 10 for event in trained)


ONE = Compute(precision="float32")
SAMPLES = Samples(Release(0.5, 0.2, 4), bytes(range(32)))


class Jobs:
    """Of one site, each with its own processes."""

    def __init__(self, folder: Path) -> None:
        write_intents(folder, ["a", "b"], 40, 24, 0)
        write_tiny_llama(folder / "model", (folder / "a.jsonl").read_text().splitlines())
        self._folder = folder
        self.faults: list[bool] = []

    def start(self, name: str, compute: Compute = ONE) -> Job:
        work, model, data = self._folder / name, self._folder / "model", self._folder / "a.jsonl"
        work.mkdir()
        site = SiteConfig(coordinator="127.0.0.1:1", model=model, data=data, work=work, compute=compute)
        terms, hashes = Training(batch_size=8, max_length=128), (hash_model(model).whole, files.digest(data))
        spec = JobSpec.of(site, hashes, Lora(r=4), terms, FedAvg(), record_dpsgd=RecordDpSgd(epsilon=8))
        return Job(spec, site, lambda _, again: self.faults.append(again))


def train(job: Job, in_step_2: Callable[[list[int]], None] = lambda _: None) -> np.ndarray:
    """The adapter; in the second step, of the first try, something is done with the workers' process ids."""
    done: list[int] = []

    def progress(step: int, _: int) -> None:
        if step == 2 and not done:
            done.append(step)
            assert job._running
            in_step_2([worker for process in job._running._processes for worker in workers_of(process.pid)])

    try:
        names = [name for name, _ in job.schema]
        return job.train(initial_adapter(job.schema, 0), SAMPLES, names, progress).adapter
    finally:
        job.close()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def seen() -> list[str]:
    """What other users of the machine see of the worker of `alone`."""
    return []


@pytest.fixture(scope="module")
def alone(jobs: Jobs, seen: list[str]) -> np.ndarray:
    def look(workers: list[int]) -> None:
        for worker in map(psutil.Process, workers):
            seen.extend((*worker.cmdline(), *worker.environ().values()))

    return train(jobs.start("alone"), look)


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_have_the_adapter_of_one_to_the_last_bit(jobs: Jobs, alone: np.ndarray, sharded: bool) -> None:
    """Integers are added up, in whatever order; the noise is the head's."""
    two = ONE.model_copy(update={"nodes": (Node(processes=2),), "sharded": sharded})
    assert np.array_equal(train(jobs.start(f"two-{sharded}", two)), alone)


def test_job_that_is_killed_on_the_way_repeats_its_samples_and_noise(jobs: Jobs, alone: np.ndarray) -> None:
    """Else an operator could kill it until it likes what it sees."""

    def kill(workers: list[int]) -> None:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)

    assert np.array_equal(train(jobs.start("killed"), kill), alone)
    assert jobs.faults == [True]


@pytest.mark.usefixtures("alone")
def test_worker_shows_its_secret_to_nobody(jobs: Jobs, seen: list[str]) -> None:
    logs = [path.read_text(errors="replace") for path in (jobs._folder / "alone").rglob("*.log")]
    assert logs
    assert "-u" in seen
    assert not any(SAMPLES.secret.hex() in text for text in [*seen, *logs])


@pytest.mark.slow
def test_delta_that_is_too_large_for_local_rows_is_the_error_of_start(tmp_path: Path) -> None:
    """The coordinator hears only that a site stops; who has started the sites hears why."""
    config = SMOKE.parent / "privacy" / "record_dpsgd.yaml"
    result = run_cli("start", config, "--runs", tmp_path / "runs", "--set", "privacy.record_dpsgd.delta=0.05")
    assert result.returncode == 2
    assert "privacy.record_dpsgd.delta: 0.05 is outside (0, 1/128)" in result.stderr
    assert "refuses: it stops" in result.stdout
