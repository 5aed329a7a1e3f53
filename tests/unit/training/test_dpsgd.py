"""DP-SGD's step: what one record may change is bounded, and the noise is what is charged."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peft import PeftModel
from unit.training.test_record_gradients import by_itself

from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute
from mpctf_secure.errors import UsageError
from mpctf_secure.privacy.accountant import Release
from mpctf_secure.privacy.audit import lower_bound
from mpctf_secure.privacy.gaussian import epsilon
from mpctf_secure.privacy.records import Samples
from mpctf_secure.training.data import Example
from mpctf_secure.training.dpsgd import UNITS, DpSgd, _clipped_sum
from mpctf_secure.training.group import ALONE
from mpctf_secure.training.loop import Recipe, trained_parameters
from mpctf_secure.training.model import load_adapter_model, read_adapter, write_adapter
from mpctf_secure.training.record_gradients import RecordGradients

RECIPE = Recipe(batch_size=4, epochs=1, learning_rate=1e-2, pad_id=0)
RECORDS = [Example(tuple((seed * 13 + place * 5) % 60 for place in range(20 + seed)), 3) for seed in range(8)]
SILENT = 2.0**-24
"""A noise multiplier of one unit: the least there is."""


@pytest.fixture
def model(folder: Path) -> PeftModel:
    model = load_adapter_model(folder, Lora(r=4), Compute(precision="float32"))
    write_adapter(model, (np.sin(np.arange(read_adapter(model).size)) / 10).astype(np.float32))
    return model


def gradients_of(model: PeftModel) -> RecordGradients:
    return RecordGradients(model, [len(record.input_ids) for record in RECORDS], 64, 8, 0, ALONE)


def dpsgd(model: PeftModel, clip_norm: float = 1.0, records: int = 4) -> DpSgd:
    """Each step expects all of so many records."""
    return DpSgd(model, ALONE, gradients_of(model), clip_norm, records)


def samples(noise_multiplier: float = 1.0, secret: bytes = bytes(32)) -> Samples:
    return Samples(Release(noise_multiplier), secret)


def train(model: PeftModel, steps: Sequence[Sequence[Example]], recipe: Recipe = RECIPE) -> np.ndarray:
    dpsgd(model).train(steps, samples(), recipe, lambda *_: None, lambda: None)
    return read_adapter(model)


FLOATS = hnp.arrays(np.float32, (5, 12), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))


@given(FLOATS, st.sampled_from([1e-6, 0.3, 1.0, 1e6]))
def test_no_record_becomes_integers_longer_than_k(found: np.ndarray, clip_norm: float) -> None:
    gradients = torch.from_numpy(found)
    for record in gradients:
        integers = _clipped_sum([record[None, :5], record[None, 5:]], clip_norm)
        assert sum(int(value) ** 2 for value in integers) <= UNITS**2


@given(FLOATS)
def test_sum_is_that_of_a_loop_over_records(found: np.ndarray) -> None:
    expected = np.zeros(12)
    for record in found.astype(np.float64):
        norm = np.sqrt(np.square(record).sum())
        if np.isfinite(norm):
            expected += record * min(1, 0.5 / norm) if norm else 0
    total = _clipped_sum([torch.from_numpy(found)], 0.5).numpy() * 0.5 / UNITS
    assert np.abs(total - expected).max() < 1e-5


def test_record_that_is_no_number_counts_as_nothing_and_spoils_no_other() -> None:
    good = torch.tensor([[0.3, -0.4]])
    for bad in (math.nan, math.inf, -math.inf, 3e38):
        both = torch.cat([good, torch.tensor([[bad, 3e38 if bad == 3e38 else 0.0]])])
        alone = _clipped_sum([good], 1.0)
        change = (_clipped_sum([both], 1.0) - alone).double().norm()
        assert change <= UNITS
        assert (change == 0) == (not math.isfinite(bad))
    # Multiplied by zero it would be this much, where the noise is some millions:
    assert (torch.tensor(math.inf) * 0).long() < -(2**62)


def test_hardly_any_noise_is_the_mean_of_a_loop_over_single_records(model: PeftModel) -> None:
    """Against autograd alone, in float32; half of the gradients are clipped."""
    alone = [by_itself(model, record).double() for record in RECORDS]
    norms = torch.stack([gradient.norm() for gradient in alone])
    clip_norm = float(norms.median())
    expected = sum(gradient * min(1.0, clip_norm / gradient.norm()) for gradient in alone) / 10
    dpsgd(model, clip_norm, 10).gradient(samples(SILENT), lambda: None)(RECORDS)
    got = torch.cat([parameter.grad.flatten() for parameter in trained_parameters(model)])
    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert norms.min() < 0.95 * clip_norm < clip_norm < 0.95 * norms.max()


def test_same_step_has_the_same_noise_and_any_other_has_other(model: PeftModel) -> None:
    """A job that is started again repeats itself; and two empty steps do not show that they were empty."""

    def adapters(secret: bytes) -> list[np.ndarray]:
        start, found = read_adapter(model), []
        gradient = dpsgd(model).gradient(samples(secret=secret), lambda: None)
        for records in ([], [], RECORDS):
            gradient(records)
            found.append(torch.cat([p.grad.flatten() for p in trained_parameters(model)]).numpy())
        write_adapter(model, start)
        return found

    first, again, other = adapters(bytes(32)), adapters(bytes(32)), adapters(b"\1" * 32)
    assert all(map(np.array_equal, first, again))
    seen = [*first, *other]
    for index, one in enumerate(seen):
        for another in seen[index + 1 :]:
            assert abs(np.corrcoef(one, another)[0, 1]) < 5 / math.sqrt(one.size)


def test_noise_of_a_step_has_the_standard_deviation_that_is_charged(model: PeftModel) -> None:
    gradient, found = dpsgd(model, 2.0, 64).gradient(samples(0.7), lambda: None), list[torch.Tensor]()
    for _ in range(8):
        gradient([])
        found.extend(p.grad.flatten().double() for p in trained_parameters(model))
    noise = torch.cat(found)
    assert noise.numel() > 100_000
    assert noise.std() * 64 == pytest.approx(0.7 * 2.0, rel=0.01)


def test_step_without_records_is_taken(model: PeftModel) -> None:
    before = read_adapter(model)
    assert not np.array_equal(train(model, [[]]), before)


def test_optimizer_that_changes_nothing_is_noticed(model: PeftModel) -> None:
    still = Recipe(batch_size=4, epochs=1, learning_rate=0.0, pad_id=0)
    with pytest.raises(UsageError, match="changed nothing"):
        train(model, [RECORDS], still)


def test_trainables_of_less_than_32_bits_are_refused(model: PeftModel) -> None:
    next(iter(trained_parameters(model))).data = torch.zeros(4, 4, dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="not float32"):
        DpSgd(model, ALONE, None, 1.0, 4).train([], samples(), RECIPE, lambda *_: None, lambda: None)  # type: ignore[arg-type]


class OneCanary:
    """In the place of gradients: a record whose gradient is as long as may be, or none."""

    def __init__(self, direction: torch.Tensor, there: bool) -> None:
        self._direction, self._there = direction, there

    def of(self, _: object) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        if self._there:
            yield torch.zeros(()), [100 * self._direction[None]]


def audited(noise_scale: float) -> float:
    """ε that 1000 steps in either world show, as a share of what is claimed."""
    claimed = 1.5
    layer = torch.nn.Linear(4, 2, bias=False)
    direction = torch.nn.functional.normalize(torch.ones(2, 4), dim=None)  # type: ignore[arg-type]
    worlds = []
    for there in (True, False):
        seen = []
        for run in range(1000):
            of_step = samples(claimed * noise_scale, run.to_bytes(31, "big") + bytes([there]))
            canary = OneCanary(direction, there)
            DpSgd(layer, ALONE, canary, 1.0, 1).gradient(of_step, lambda: None)([])  # type: ignore[arg-type]
            seen.append(float((layer.weight.grad * direction).sum()))
        worlds.append(np.array(seen))
    return lower_bound(*worlds, 1e-5) / epsilon(1 / claimed, 1e-5)


@pytest.mark.parametrize(("scale", "caught"), [(1.0, False), (0.5, True)])
def test_white_box_audit_catches_half_the_noise(scale: float, caught: bool) -> None:
    found = audited(scale)
    assert (found > 1) == caught
    assert found > 0.6
