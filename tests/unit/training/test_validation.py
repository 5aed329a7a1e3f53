import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from mpctf_secure import files
from mpctf_secure.aggregation.lora import initial_adapter
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute, SiteConfig
from mpctf_secure.config.strategies import FedAvg
from mpctf_secure.config.training import Training
from mpctf_secure.errors import EnvironmentUnfitError, UsageError
from mpctf_secure.experiments.intents import write_intents
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.partition.held_out import divide
from mpctf_secure.training.batching import answer_tokens, collate
from mpctf_secure.training.data import Example, tokenise
from mpctf_secure.training.faults import FailedError
from mpctf_secure.training.group import Group
from mpctf_secure.training.loop import Recipe, summed_loss, train_steps
from mpctf_secure.training.model import adapter_schema, add_lora, load_base, read_adapter, write_adapter
from mpctf_secure.training.model_hash import hash_model
from mpctf_secure.training.rows import load_rows
from mpctf_secure.training.spec import JobSpec
from mpctf_secure.training.validation import Search, held_out_loss, points
from mpctf_secure.training.watch import Watch
from mpctf_secure.training.worker import Worker

LORA = Lora(r=4, alpha=8)
RECIPE = Recipe(batch_size=8, epochs=1, learning_rate=1e-2, pad_id=0)
ROWS = 40
TRAINED, HELD_OUT = divide(0.25, ROWS, 5, "a")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_intents(folder / "data", ["a", "b"], ROWS, 24, 0)
    write_tiny_llama(folder / "model", (folder / "data" / "a.jsonl").read_text().splitlines())
    return folder


@pytest.fixture(scope="module")
def examples(folder: Path) -> list[Example]:
    return tokenise(load_rows(folder / "data" / "a.jsonl"), AutoTokenizer.from_pretrained(folder / "model"), 128)[0]


@pytest.fixture
def model(folder: Path) -> PeftModel:
    """In training it draws random numbers at every layer."""
    base = load_base(folder / "model", torch.float32)
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return add_lora(base, LORA)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (4, {1, 2, 3, 4}), (7, {2, 4, 6, 7}), (100, {25, 50, 75, 100})],
)
def test_the_best_is_looked_for_at_four_points_as_far_as_there_are_steps(steps: int, expected: set[int]) -> None:
    assert points(steps, "best") == expected
    assert points(steps, "last") == {steps}


LOSSES = {
    "the lowest": ([4, 2, 3, 5], 2),
    "the earlier of two that are alike": ([4, 2, 2, 3], 2),
    "the last if it always gets better": ([4, 3, 2, 1], 4),
    "the first if it always gets worse": ([1, 2, 3, math.inf], 1),
    "a number before NaN": ([math.nan, math.inf, math.nan, math.nan], 2),
    "the last if all is lost": ([math.nan] * 4, 4),
}


@pytest.mark.parametrize(("losses", "expected"), LOSSES.values(), ids=LOSSES.keys())
def test_best_adapter_is(losses: list[float], expected: int) -> None:
    step = 0
    search = Search("best", lambda: [7.0, *losses][step], lambda: np.full(3, step, np.float32))
    for step in range(1, 5):
        search.after_step(step, 4)
    assert search.before == 7.0
    assert (search.best.step, search.best.adapter[0]) == (expected, expected)
    assert np.array_equal(search.best.loss, losses[expected - 1], equal_nan=True)


def test_last_measures_before_and_after() -> None:
    measured = []
    search = Search("last", lambda: measured.append(1) or 1.0, lambda: np.zeros(3, np.float32))
    for step in range(1, 9):
        search.after_step(step, 8)
    assert (search.best.step, measured) == (8, [1, 1])


def loss_of(model: PeftModel, examples: list[Example], recipe: Recipe = RECIPE) -> float:
    return held_out_loss(model, examples, recipe, Group(), lambda: None)


def test_held_out_loss_is_the_mean_over_all_answer_tokens_however_they_are_divided(
    model: PeftModel, examples: list[Example]
) -> None:
    model.eval()
    with torch.inference_mode():
        expected = sum(float(summed_loss(model, collate([one], 0, torch.device("cpu")))) for one in examples)
    for recipe in (RECIPE, replace(RECIPE, batch_size=3), replace(RECIPE, micro_batch=3), replace(RECIPE, pad_id=1)):
        loss = loss_of(model, examples, recipe)
        assert loss == pytest.approx(expected / answer_tokens(examples), rel=1e-5)


class Half(Group):
    """One process of two, which keeps what it would have added up."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2)
        self.parts: list[float] = []

    def add(self, tensors: Any) -> None:
        self.parts += [float(tensor) for tensor in tensors]


def test_processes_share_every_batch_and_their_parts_add_up(model: PeftModel, examples: list[Example]) -> None:
    """Nine rows in batches of eight: of the last one the second process has none, and computes a pass all the same."""
    halves, whole = [Half(0), Half(1)], loss_of(model, examples[:9])
    for half in halves:
        held_out_loss(model, examples[:9], RECIPE, half, lambda: None)
    assert [len(half.parts) for half in halves] == [2, 2]
    assert halves[1].parts[1] == 0
    total = sum(halves[0].parts) + sum(halves[1].parts)
    assert total / answer_tokens(examples[:9]) == pytest.approx(whole, rel=1e-5)


def test_there_is_a_sign_of_life_after_every_batch(model: PeftModel, examples: list[Example]) -> None:
    signs = []
    held_out_loss(model, examples[:20], RECIPE, Group(), lambda: signs.append(1))
    assert len(signs) == 3


def test_measuring_leaves_mode_gradients_and_random_state_alone(model: PeftModel, examples: list[Example]) -> None:
    train_steps(model, examples[:8], RECIPE)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    before, adapter = torch.get_rng_state(), read_adapter(model)
    loss_of(model, examples)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(read_adapter(model), adapter)
    assert all(module.training for module in model.modules())
    assert gradients
    assert all(torch.equal(model.get_parameter(name).grad, gradient) for name, gradient in gradients.items())


def test_training_that_is_measured_is_the_same_bit_by_bit(model: PeftModel, examples: list[Example]) -> None:
    ends, measured = [], []
    for after_step in (lambda *_: None, lambda *_: measured.append(loss_of(model, examples[30:]))):
        write_adapter(model, initial_adapter(adapter_schema(model), 1))
        torch.manual_seed(0)
        train_steps(model, examples[:30], RECIPE, after_step=after_step)
        ends.append(read_adapter(model))
    assert np.array_equal(*ends)
    assert len(measured) == 4


class Agent:
    """The other end of a worker's channel: asks for one round of all rows and keeps what it hears."""

    def __init__(self, worker: Worker, start: np.ndarray | None) -> None:
        schema = adapter_schema(worker.model)
        rows = list(range(worker.describe()["rows"]))
        adapter = initial_adapter(schema, 0) if start is None else start
        self._requests = [({"rows": rows, "names": [name for name, _ in schema]}, adapter)]
        self.heard: list[dict[str, Any]] = []
        self.adapter = np.zeros(0, np.float32)

    def receive(self) -> tuple[dict[str, Any], np.ndarray]:
        if not self._requests:
            raise EnvironmentUnfitError("gone")
        return self._requests.pop()

    def send(self, header: dict[str, Any], body: np.ndarray | None = None) -> None:
        self.heard.append(header)
        if body is not None:
            self.adapter = body


def make_worker(folder: Path, data: Path, **terms: Any) -> Worker:
    training = Training(batch_size=8, max_length=128, **terms)
    compute = Compute(precision="float32")
    site = SiteConfig(coordinator="127.0.0.1:1", model=folder / "model", data=data, work=folder, compute=compute)
    spec = JobSpec.of(site, (hash_model(site.model).whole, files.digest(data)), LORA, training, FedAvg(), 5, "a")
    return Worker(spec, Group())


def trained(folder: Path, data: Path, start: np.ndarray | None = None, **terms: Any) -> Agent:
    worker = make_worker(folder, data, **terms)
    agent = Agent(worker, start)
    worker.serve(agent, Watch(1, (), folder, gathers=False))  # type: ignore[arg-type]
    return agent


def test_held_out_rows_are_neither_counted_nor_trained_on(folder: Path, examples: list[Example]) -> None:
    worker = make_worker(folder, folder / "data" / "a.jsonl", validation=0.25)
    told = worker.describe()
    assert (told["rows"], told["held_out"]) == (len(TRAINED), len(HELD_OUT))
    assert len(TRAINED) == 30
    assert worker._examples == [examples[index] for index in TRAINED]
    assert worker._held_out == [examples[index] for index in HELD_OUT]


def test_last_adapter_is_that_of_the_same_rows_without_held_out_ones_bit_by_bit(folder: Path) -> None:
    lines = (folder / "data" / "a.jsonl").read_text().splitlines(keepends=True)
    (folder / "fewer.jsonl").write_text("".join(lines[index] for index in TRAINED))
    terms = {"learning_rate": 1e-2, "local_epochs": 2}
    plain = trained(folder, folder / "fewer.jsonl", **terms)
    held = trained(folder, folder / "data" / "a.jsonl", validation=0.25, **terms)
    assert np.array_equal(held.adapter, plain.adapter)
    assert held.heard[-1]["held_out"]["sent_step"] == 8
    assert "held_out" not in plain.heard[-1]
    sign_of_life = {"resources": {}}
    assert sign_of_life not in plain.heard
    assert held.heard.count(sign_of_life) == 2 * 2  # ten rows in batches of eight, before and after
    assert held.heard[-1]["loss"] == plain.heard[-1]["loss"]


def with_other_answers(data: Path, target: Path) -> Path:
    """The same rows, those that are trained on all with the same answer."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for index in TRAINED:
        rows[index]["messages"][-1]["content"] = "no"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def test_model_that_gets_worse_with_every_step_sends_an_early_adapter(folder: Path, examples: list[Example]) -> None:
    """It has learnt the held-out rows' kind of answer, and at ten times the usual learning rate soon unlearns it."""
    data, terms = folder / "data" / "a.jsonl", {"learning_rate": 1e-2, "validation": 0.25}
    start = trained(folder, data, local_epochs=8, **terms).adapter
    contrary = with_other_answers(data, folder / "contrary.jsonl")
    last, best = (trained(folder, contrary, start, send=send, **terms) for send in ("last", "best"))
    assert [said["step"] for said in best.heard if "step" in said] == [1, 2, 3, 4]
    found, found_last = (said.heard[-1]["held_out"] for said in (best, last))
    assert (found["sent_step"], found_last["sent_step"]) == (1, 4)
    assert found["loss_after"] < found_last["loss_after"] - 0.1
    assert best.heard[-1]["loss"] == last.heard[-1]["loss"]
    model = add_lora(load_base(folder / "model", torch.float32), LORA)
    held_out = [examples[index] for index in HELD_OUT]
    for adapter, loss in ((start, found["loss_before"]), (best.adapter, found["loss_after"])):
        write_adapter(model, adapter)
        assert loss_of(model, held_out) == pytest.approx(loss, rel=1e-5)


def test_worker_tells_what_its_base_model_is_held_in(folder: Path) -> None:
    assert make_worker(folder, folder / "data" / "a.jsonl").describe()["hardware"]["base"] == "torch.float32"


def test_data_file_of_a_single_row_is_named(folder: Path) -> None:
    data = folder / "single.jsonl"
    data.write_text((folder / "data" / "a.jsonl").read_text().splitlines(keepends=True)[0])
    make_worker(folder, data)
    with pytest.raises(FailedError, match=r"single\.jsonl: training\.validation holds out its only row") as caught:
        make_worker(folder, data, validation=0.01)
    assert isinstance(caught.value.__cause__, UsageError)
