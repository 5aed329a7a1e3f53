"""No record shows in the gradient of another: to the last bit, or each is alone."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, OPTConfig

from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute
from mpctf_secure.errors import UsageError
from mpctf_secure.training import record_gradients
from mpctf_secure.training.batching import collate
from mpctf_secure.training.data import Example
from mpctf_secure.training.group import ALONE, Group
from mpctf_secure.training.loop import trained_parameters
from mpctf_secure.training.model import add_lora, device_of, load_adapter_model, read_adapter, write_adapter
from mpctf_secure.training.record_gradients import RecordGradients

LONGEST = 160
RECORDS = [Example(tuple((seed * 13 + place * 5) % 60 for place in range(length)), 1 + seed % 7)
           for seed, length in enumerate([9, 30, 63, 64, 65, 70, 100, 128, 150, 160, 12, 40, 41])]  # fmt: skip
WIDTHS = {64, 128, 160}


class Pretended(Group):
    """One of several processes that always agree."""

    def agrees(self, own: bool) -> bool:
        return own


def load(folder: Path, **compute: object) -> PeftModel:
    model = load_adapter_model(folder, Lora(r=4), Compute(**{"precision": "float32", **compute}))
    flat = read_adapter(model)
    write_adapter(model, (np.sin(np.arange(flat.size)) / 10).astype(np.float32))
    return model


@pytest.fixture(scope="module")
def model(folder: Path) -> PeftModel:
    return load(folder)


def gradients_of(model: PeftModel, group: Group = ALONE, rows: int = 8) -> RecordGradients:
    return RecordGradients(model, [len(one.input_ids) for one in RECORDS], LONGEST, rows, 0, group)


def each(gradients: RecordGradients, records: Sequence[Example]) -> Iterator[tuple[Example, torch.Tensor]]:
    """Every record with its gradient [d]; rows that were too many have none."""
    for one, (_, found) in zip(gradients._plan(records), gradients.of(records), strict=True):
        flat = torch.cat([part.flatten(1) for part in found], 1)
        assert not flat[len(one.records) :].any()
        yield from zip(one.records, flat, strict=False)


def by_itself(model: PeftModel, record: Example) -> torch.Tensor:
    """The gradient of the mean loss over its answer tokens, by nothing but autograd."""
    model.zero_grad()
    batch = collate([record], 0, device_of(model))
    model(input_ids=batch.input_ids, labels=torch.where(
        torch.arange(len(record.input_ids)) < record.answer_start, -100, batch.input_ids)).loss.backward()  # fmt: skip
    return torch.cat([parameter.grad.flatten() for parameter in trained_parameters(model)])


@pytest.mark.parametrize("rows", [8, 1, 3])
def test_every_record_has_the_gradient_that_it_has_alone(model: PeftModel, rows: int) -> None:
    gradients = gradients_of(model, rows=rows)
    assert gradients.together == (set() if rows == 1 else WIDTHS)
    found = list(each(gradients, RECORDS))
    assert sorted(record.input_ids for record, _ in found) == sorted(record.input_ids for record in RECORDS)
    for record, gradient in found:
        alone = by_itself(model, record)
        assert (gradient - alone).norm() < 1e-5 * alone.norm()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(len(RECORDS))), st.integers(1, len(RECORDS)))
def test_others_change_no_bit_of_it(model: PeftModel, order: list[int], size: int) -> None:
    gradients = gradients_of_once(model)
    chosen = [RECORDS[index] for index in order[:size]]
    lonely = dict(each(gradients, chosen[:1]))
    beside = dict(each(gradients, chosen))
    assert torch.equal(lonely[chosen[0]], beside[chosen[0]])


_ONCE: dict[int, RecordGradients] = {}


def gradients_of_once(model: PeftModel) -> RecordGradients:
    return _ONCE.setdefault(id(model), gradients_of(model))


def test_padding_to_the_longest_of_a_batch_would_change_bits(model: PeftModel) -> None:
    """What the fixed widths are for: as batches are padded elsewhere, a longer neighbour shows."""
    short, long = RECORDS[1], RECORDS[9]
    found = list[torch.Tensor]()
    for rows in ([short, short], [short, long]):
        with record_gradients._hooks(model):
            _, parts = record_gradients._backward(model, collate(rows, 0, CPU))
        found.append(torch.cat([part.flatten(1) for part in parts], 1)[0])
    assert found[0].any()
    assert not torch.equal(*found)
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


CPU = torch.device("cpu")


def test_bfloat16_base_passes_the_trial_too(folder: Path) -> None:
    assert gradients_of(load(folder, precision="bfloat16")).together == WIDTHS


def test_trial_leaves_the_adapter_as_it_was(folder: Path) -> None:
    model = load(folder)
    before = read_adapter(model)
    gradients_of(model)
    assert np.array_equal(read_adapter(model), before)


def test_activations_that_are_computed_again_go_one_by_one(folder: Path) -> None:
    """Hooks see nothing there, and say nothing."""
    model = load(folder, gradient_checkpointing=True)
    gradients = gradients_of(model)
    assert not gradients.together
    for record, gradient in each(gradients, RECORDS[:4]):
        alone = by_itself(model, record)
        assert (gradient - alone).norm() < 1e-5 * alone.norm()


@pytest.mark.parametrize("first", [0, 4, 7])
def test_layer_that_mixes_records_is_found(folder: Path, first: int) -> None:
    """In whatever rows it does: another record's presence changes this one's gradient."""

    def mixed(_: object, __: object, hidden: torch.Tensor) -> torch.Tensor:
        found = hidden.clone()
        found[first:] += 1e-3 * hidden.mean(0, keepdim=True)
        return found

    model = load(folder)
    model.get_base_model().model.layers[0].mlp.register_forward_hook(mixed)
    assert not gradients_of(model).together


def test_records_go_alone_through_experts() -> None:
    """How many tokens one gets, and so how they are rounded, depends on all rows: a trial may be lucky."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **size)
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    gradients = gradients_of(add_lora(base, Lora(r=4, target_modules=("q_proj", "v_proj"))))
    assert (gradients.together, gradients.rows) == (set(), 1)


def dynamic(longest: int) -> PeftModel:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, max_position_embeddings=longest, rope_parameters=rope, **size)
    return add_lora(AutoModelForCausalLM.from_config(config).requires_grad_(False), Lora(r=4))


def test_model_that_keeps_long_records_in_mind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check one long record changes the gradients of all that follow, in all steps."""
    gradients_of(dynamic(LONGEST))
    with pytest.raises(UsageError, match="dynamic RoPE") as caught:
        gradients_of(dynamic(32))
    assert caught.value.hint == "training.max_length 32 or less"
    monkeypatch.setattr(record_gradients, "_check_forgets", lambda *_: None)
    gradients = gradients_of(dynamic(32), rows=1)
    [(_, before)] = each_alone(gradients, RECORDS[11])
    each_alone(gradients, RECORDS[9])
    [(_, after)] = each_alone(gradients, RECORDS[11])
    assert (after - before).norm() > 1e-3 * before.norm()


def each_alone(gradients: RecordGradients, record: Example) -> list[tuple[Example, torch.Tensor]]:
    write_adapter(gradients._model, np.full(read_adapter(gradients._model).size, 0.1, np.float32))
    return list(each(gradients, [record]))


def spoilt(which: str) -> Callable[[torch.nn.Parameter, int], torch.Tensor]:
    real = record_gradients._left_in

    def left_in(parameter: torch.nn.Parameter, records: int) -> torch.Tensor:
        found = real(parameter, records)
        is_a = parameter.shape[0] == 4
        return 2 * found if records > 1 and is_a == (which == "A") else found

    return left_in


@pytest.mark.parametrize("which", ["A", "B"])
def test_wrong_gradients_of_either_factor_are_found(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """Of A too, whose gradient is zero as long as B is."""
    monkeypatch.setattr(record_gradients, "_left_in", spoilt(which))
    assert not gradients_of(model).together


def test_dropout_is_not_applied_where_activations_are_computed_again() -> None:
    """OPT's layers apply it themselves as long as they train."""
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(**size, dropout=0.5, max_position_embeddings=LONGEST, word_embed_proj_dim=16)
    model = add_lora(AutoModelForCausalLM.from_config(config).requires_grad_(False), Lora(r=4))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first, again = (dict(each(gradients_of(model), RECORDS[:3])) for _ in range(2))
    assert all(torch.equal(gradient, again[record]) for record, gradient in first.items())


def test_dropout_of_the_base_is_not_applied() -> None:
    """Its masks come from one generator for all records: with another record there they would all be others."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=LONGEST, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5, attn_pdrop=0.5
    )
    model = add_lora(AutoModelForCausalLM.from_config(config).requires_grad_(False), Lora(r=4))
    gradients = gradients_of(model)
    assert gradients.together == WIDTHS
    first, again = (dict(each(gradients, RECORDS)) for _ in range(2))
    assert all(torch.equal(gradient, again[record]) for record, gradient in first.items())


@pytest.mark.parametrize("size", [2, 3, 5])
def test_processes_share_records_and_have_equally_many_passes(model: PeftModel, size: int) -> None:
    """As a sharded model needs."""
    whole = sum((torch.cat([p.sum(0).flatten() for p in found]) for _, found in gradients_of_once(model).of(RECORDS)))
    passes, total = set(), torch.zeros_like(whole)
    for rank in range(size):
        gradients = gradients_of(model, Pretended(rank, size))
        parts = [torch.cat([part.sum(0).flatten() for part in found]) for _, found in gradients.of(RECORDS)]
        passes.add(len(parts))
        total += sum(parts)
    assert len(passes) == 1
    assert torch.allclose(total, whole, rtol=1e-4, atol=1e-7)


def test_record_goes_to_the_same_process_whatever_the_others_are(model: PeftModel) -> None:
    """Nodes of unlike kind round differently: who else is there must not decide where a record is computed."""
    others = RECORDS[1:]
    for rank in range(3):
        gradients = gradients_of(model, Pretended(rank, 3))
        with_all, without = (sum(bool(part[0].any()) for _, part in gradients.of(some)) for some in (RECORDS, others))
        assert with_all - without in {0, 1}
    assert {record_gradients._process_of(record, 3) for record in RECORDS} == {0, 1, 2}


def test_step_without_records_has_no_passes(model: PeftModel) -> None:
    assert not list(gradients_of_once(model).of([]))
