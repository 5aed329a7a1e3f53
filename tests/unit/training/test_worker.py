from pathlib import Path

import pytest
import torch

from mpctf_secure import files
from mpctf_secure.aggregation.lora import initial_adapter
from mpctf_secure.config.privacy import RecordDpSgd
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute, SiteConfig
from mpctf_secure.config.strategies import FedProx
from mpctf_secure.config.training import Training
from mpctf_secure.errors import EnvironmentUnfitError, UsageError
from mpctf_secure.experiments.intents import write_intents
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.privacy.accountant import Release
from mpctf_secure.privacy.records import Samples
from mpctf_secure.rounds.messages import FaultCode
from mpctf_secure.training import worker as worker_module
from mpctf_secure.training.data import Example
from mpctf_secure.training.dpsgd import DpSgd
from mpctf_secure.training.faults import FailedError
from mpctf_secure.training.group import Group
from mpctf_secure.training.model_hash import hash_model
from mpctf_secure.training.spec import JobSpec
from mpctf_secure.training.work import Work
from mpctf_secure.training.worker import Worker


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> SiteConfig:
    folder = tmp_path_factory.mktemp("site")
    write_intents(folder, ["a", "b"], 16, 12, 0)
    write_tiny_llama(folder / "model", (folder / "a.jsonl").read_text().splitlines())
    return SiteConfig(coordinator="127.0.0.1:1", model=folder / "model", data=folder / "a.jsonl", compute=Compute())


def spec(site: SiteConfig, **changes: object) -> JobSpec:
    hashes = hash_model(site.model).whole, files.digest(site.data)
    terms = Training(batch_size=8, max_length=128)
    return JobSpec.of(site, hashes, Lora(r=2), terms, FedProx(), 0, "a").model_copy(update=changes)


def test_mu_of_the_run_reaches_the_loop(site: SiteConfig) -> None:
    hashes = hash_model(site.model).whole, files.digest(site.data)
    prox = JobSpec.of(site, hashes, Lora(r=2), Training(), FedProx(mu=0.25), 0, "a")
    assert Worker(prox, Group())._recipe.mu == 0.25


SPOILT = {
    "another base model": ({"model_hash": "00" * 32}, FaultCode.BAD_MODEL, "another base model"),
    "no model": ({"model": Path("/nowhere")}, FaultCode.BAD_MODEL, "/nowhere"),
    "another data file": ({"data_hash": "00" * 32}, FaultCode.BAD_DATA, "changed since"),
    "no data file": ({"data": Path("/nowhere.jsonl")}, FaultCode.BAD_DATA, "/nowhere.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "code", "text"), SPOILT.values(), ids=SPOILT.keys())
def test_what_a_worker_cannot_use_is_told_by_a_code_and_named_at_the_site(
    site: SiteConfig, changes: dict[str, object], code: FaultCode, text: str
) -> None:
    with pytest.raises(FailedError, match=text) as caught:
        Worker(spec(site, **changes), Group())
    assert caught.value.code == code
    assert caught.value.hint


def test_out_of_memory_says_batch_length_and_what_would_help(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(spec(site, compute=Compute(micro_batch=6)), Group())
    schema = worker.describe()["schema"]
    monkeypatch.setattr(worker_module, "train_steps", lambda *_: torch.empty(1 << 60))
    examples = [Example(tuple(range(30)), 5)] * 8
    with pytest.raises(FailedError, match="6 rows of up to 30 tokens") as caught:
        worker._train(initial_adapter(schema, 0), Work([], [examples]), lambda *_: None)
    assert caught.value.code == FaultCode.OUT_OF_MEMORY
    assert caught.value.hint == "compute.micro_batch: 3 or gradient_checkpointing: true in the site file"


def test_advice_names_nothing_that_the_site_does_already(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(spec(site, compute=Compute(micro_batch=1, gradient_checkpointing=True)), Group())
    monkeypatch.setattr(worker_module, "train_steps", lambda *_: torch.empty(1 << 60))
    with pytest.raises(FailedError, match="1 rows") as caught:
        worker._train(
            initial_adapter(worker.describe()["schema"], 0), Work([], [[Example((1, 2), 1)] * 8]), lambda *_: None
        )
    assert caught.value.hint == "more memory, or a smaller training.max_length"


def test_noise_on_records_is_what_the_agent_has_asked_for(site: SiteConfig) -> None:
    """And the other processes hear of all of it but the secret."""
    worker = Worker(spec(site, record_dpsgd=RecordDpSgd(epsilon=8, clip_norm=0.25)), Group())
    samples = Samples(Release(1.5, 0.25, 6), b"\xab" * 32)
    work = worker._work({"names": ["a"], "samples": samples.encode(), "secret": samples.secret.hex()})
    assert worker._dpsgd is not None
    assert (worker._dpsgd.clip_norm, worker._dpsgd.records) == (0.25, 16)
    assert work.samples == samples
    assert work.steps == [[worker._examples[index] for index in step] for step in samples.draw(16)]
    heard = Work.decode(work.encode())
    assert heard == Work(["a"], work.steps, Samples(samples.release))
    assert samples.secret.hex().encode() not in work.encode()


def test_job_of_dpsgd_never_trains_without_noise(site: SiteConfig) -> None:
    worker = Worker(spec(site, record_dpsgd=RecordDpSgd(epsilon=8)), Group())
    with pytest.raises(KeyError, match="samples"):
        worker._work({"names": [], "rows": [1, 2]})
    with pytest.raises(AssertionError):
        worker._train(initial_adapter(worker.describe()["schema"], 0), Work([], [[]]), lambda _: None)


GONE = EnvironmentUnfitError("the agent is gone", hint="none")


@pytest.mark.parametrize(
    ("error", "seen"), [(UsageError("nothing", hint="x"), FailedError), (GONE, EnvironmentUnfitError)]
)
def test_agent_that_went_away_is_no_mistake_of_dpsgd(
    site: SiteConfig, monkeypatch: pytest.MonkeyPatch, error: Exception, seen: type[Exception]
) -> None:
    """Else a job whose link broke would be hopeless, and not be started again."""
    worker = Worker(spec(site, record_dpsgd=RecordDpSgd(epsilon=8)), Group())

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(DpSgd, "train", fail)
    work = Work([], [[]], Samples(Release(1.0)))
    with pytest.raises(seen):
        worker._train(initial_adapter(worker.describe()["schema"], 0), work, lambda _: None)


def test_model_that_does_not_fit_is_told_apart_from_rows_that_do_not(
    site: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "load_adapter_model", lambda *_: torch.empty(1 << 60))
    with pytest.raises(FailedError, match="base model alone") as caught:
        Worker(spec(site, compute=Compute(precision="float32")), Group())
    assert caught.value.code == FaultCode.OUT_OF_MEMORY
    assert "precision: bfloat16" in caught.value.hint


def test_another_error_in_training_is_none_of_memory(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(spec(site), Group())
    monkeypatch.setattr(worker_module, "train_steps", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        worker._train(initial_adapter(worker.describe()["schema"], 0), Work([], []), lambda *_: None)
