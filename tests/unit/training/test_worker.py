from pathlib import Path

import pytest
import torch

from mpctf_secure import files
from mpctf_secure.aggregation.lora import initial_adapter
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute, SiteConfig
from mpctf_secure.config.strategies import FedProx
from mpctf_secure.config.training import Training
from mpctf_secure.experiments.intents import write_intents
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.rounds.messages import FaultCode
from mpctf_secure.training import worker as worker_module
from mpctf_secure.training.data import Example
from mpctf_secure.training.group import Group
from mpctf_secure.training.model_hash import hash_model
from mpctf_secure.training.spec import JobSpec
from mpctf_secure.training.worker import FailedError, Worker


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> SiteConfig:
    folder = tmp_path_factory.mktemp("site")
    write_intents(folder, ["a", "b"], 16, 12, 0)
    write_tiny_llama(folder / "model", (folder / "a.jsonl").read_text().splitlines())
    return SiteConfig(coordinator="127.0.0.1:1", model=folder / "model", data=folder / "a.jsonl", compute=Compute())


def spec(site: SiteConfig, **changes: object) -> JobSpec:
    hashes = hash_model(site.model), files.digest(site.data)
    terms = Training(batch_size=8, max_length=128)
    return JobSpec.of(site, hashes, Lora(r=2), terms, FedProx(), 0, "a").model_copy(update=changes)


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
        worker._train(initial_adapter(schema, 0), [], examples, lambda *_: None)
    assert caught.value.code == FaultCode.OUT_OF_MEMORY
    assert "micro_batch: 3" in caught.value.hint


def test_another_error_in_training_is_none_of_memory(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(spec(site), Group())
    monkeypatch.setattr(worker_module, "train_steps", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        worker._train(initial_adapter(worker.describe()["schema"], 0), [], [], lambda *_: None)
