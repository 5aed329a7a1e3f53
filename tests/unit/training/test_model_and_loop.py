import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, GPT2Config, LlamaConfig, OPTConfig

from mpctf_secure.aggregation.lora import flat_size, initial_adapter, split_flat
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute
from mpctf_secure.errors import EnvironmentUnfitError, UsageError
from mpctf_secure.training import model as model_module
from mpctf_secure.training.adapters import save_adapter_folder, target_modules
from mpctf_secure.training.batching import Batch, batches, collate, pack
from mpctf_secure.training.data import Example, tokenise
from mpctf_secure.training.loop import Recipe, _proximal, summed_loss, train_steps
from mpctf_secure.training.model import (
    adapter_schema,
    add_lora,
    answer_logits,
    check_keeps_rows_apart,
    load_adapter_model,
    load_base,
    read_adapter,
    train_only,
    write_adapter,
)
from mpctf_secure.training.rows import load_rows

LORA = Lora(r=4, alpha=8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples(folder: Path) -> list[Example]:
    return tokenise(load_rows(folder / "data" / "a.jsonl"), AutoTokenizer.from_pretrained(folder), 256)[0]


@pytest.fixture
def model(folder: Path) -> PeftModel:
    return add_lora(load_base(folder, torch.float32), LORA)


def mean_loss(model: PeftModel, batch: Batch) -> torch.Tensor:
    return summed_loss(model, batch) / len(batch.targets)


def some_adapter(model: PeftModel) -> np.ndarray:
    """One that changes the logits: in adapter 0 all B are zero."""
    size = flat_size(adapter_schema(model))
    return (np.sin(np.arange(size)) / 10).astype(np.float32)


def test_what_is_written_is_read_back(model: PeftModel) -> None:
    flat = some_adapter(model)
    write_adapter(model, flat)
    assert np.array_equal(read_adapter(model), flat)


def test_what_is_read_is_a_copy(model: PeftModel) -> None:
    before = read_adapter(model)
    before += 1
    assert not np.array_equal(read_adapter(model), before)


def test_an_adapter_of_another_length_is_refused(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="schema"):
        write_adapter(model, np.zeros(3, np.float32))


def test_the_schema_is_sorted_and_the_adapter_float32_on_a_bfloat16_base(folder: Path) -> None:
    model = add_lora(load_base(folder, torch.bfloat16), LORA)
    names = [name for name, _ in adapter_schema(model)]
    assert names == sorted(names)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert len(target_modules(adapter_schema(model))) == 2 * 7


def test_adapter_0_leaves_the_base_model_as_it_is(folder: Path, model: PeftModel) -> None:
    write_adapter(model, initial_adapter(adapter_schema(model), 3))
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, load_base(folder, torch.float32)(tokens).logits)


def test_target_that_is_no_linear_layer_is_refused(folder: Path) -> None:
    """The factors of an embedding have other names, and the one called B does not begin at zero."""
    with pytest.raises(UsageError, match="lora_embedding_A is no factor"):
        add_lora(load_base(folder, torch.float32), Lora(r=2, target_modules=("embed_tokens",)))


def test_targets_can_be_named(folder: Path) -> None:
    model = add_lora(load_base(folder, torch.float32), Lora(r=2, target_modules=("q_proj",)))
    layers = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert target_modules(adapter_schema(model)) == layers


def test_a_target_that_the_model_lacks_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="target_modules"):
        add_lora(load_base(folder, torch.float32), Lora(target_modules=("no_such_layer",)))


def test_a_folder_without_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match=str(tmp_path)):
        load_base(tmp_path, torch.float32)


def test_peft_loads_the_saved_folder_to_the_same_logits(folder: Path, model: PeftModel, tmp_path: Path) -> None:
    write_adapter(model, some_adapter(model))
    save_adapter_folder(tmp_path, read_adapter(model), adapter_schema(model), LORA, "tiny")
    loaded = PeftModel.from_pretrained(load_base(folder, torch.float32), tmp_path)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


def test_batches_pad_on_the_right_to_their_longest_row() -> None:
    examples = [Example((1, 2, 3), 2), Example((4, 5, 6, 7), 1), Example((8, 9), 1)]
    first, last = (collate(rows, 0, CPU) for rows in batches(examples, 2))
    assert first.input_ids.tolist() == [[8, 9, 0], [1, 2, 3]]
    assert first.targets.tolist() == [9, 3]
    assert last.input_ids.tolist() == [[4, 5, 6, 7]]


def test_rows_are_sorted_within_a_window_and_stay_in_it() -> None:
    examples = [Example((row, *[0] * (1 + row % 3)), 1) for row in range(20)]
    rows = [example.input_ids[0] for rows in batches(examples, 2) for example in rows]
    assert rows == sorted(range(16), key=lambda row: row % 3) + sorted(range(16, 20), key=lambda row: row % 3)


def test_the_loss_on_gathered_states_is_the_models_own(model: PeftModel, examples: list[Example]) -> None:
    write_adapter(model, some_adapter(model))
    examples = sorted(examples[:8], key=lambda example: len(example.input_ids))
    batch = collate(examples, 0, CPU)
    labels = batch.input_ids.clone()
    labels[:, 0] = -100
    labels[:, 1:][~batch.predicts] = -100
    padding = torch.tensor([[i < len(e.input_ids) for i in range(batch.input_ids.shape[1])] for e in examples])
    own = model(input_ids=batch.input_ids, attention_mask=padding.long(), labels=labels).loss
    ours = mean_loss(model, batch)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(ours, model), gradients(own, model), rtol=1e-4, atol=1e-6)


def gradients(loss: torch.Tensor, model: PeftModel) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def test_training_lowers_the_loss_moves_only_the_adapter_and_reports(model: PeftModel, examples: list[Example]) -> None:
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    seen: list[tuple[int, int]] = []
    recipe = Recipe(batch_size=16, epochs=2, learning_rate=1e-2, pad_id=0)
    results = [train_steps(model, examples, recipe, after_step=lambda *a: seen.append(a)) for _ in range(3)]
    assert results[2].loss < 0.8 * results[0].loss
    assert results[0].rows == 80
    assert results[0].tokens == 2 * sum(len(example.input_ids) for example in examples)
    assert seen[:6] == [(i, 6) for i in range(1, 7)]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)


def test_the_same_start_and_rows_give_the_same_adapter_bit_by_bit(model: PeftModel, examples: list[Example]) -> None:
    start = initial_adapter(adapter_schema(model), 1)
    ends = []
    for _ in range(2):
        write_adapter(model, start)
        train_steps(model, examples[:16], Recipe(batch_size=8, epochs=1, learning_rate=1e-3, pad_id=0))
        ends.append(read_adapter(model))
    assert np.array_equal(*ends)
    assert not np.array_equal(ends[0], start)


def trained(model: PeftModel, examples: list[Example], recipe: Recipe) -> tuple[np.ndarray, float]:
    """The adapter after training from adapter 0, and the loss."""
    write_adapter(model, initial_adapter(adapter_schema(model), 1))
    result = train_steps(model, examples, recipe)
    return read_adapter(model), result.loss


def distance(model: PeftModel, one: np.ndarray, other: np.ndarray) -> float:
    """Relative to the way from adapter 0: AdamW's first steps make much of the last bits of gradients near zero."""
    start = initial_adapter(adapter_schema(model), 1)
    return float(np.linalg.norm(one - other) / np.linalg.norm(other - start))


RECIPE = Recipe(batch_size=8, epochs=1, learning_rate=1e-3, pad_id=0)


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
def test_micro_batches_change_nothing_but_the_order_of_sums(
    model: PeftModel, examples: list[Example], micro_batch: int
) -> None:
    whole, loss = trained(model, examples[:20], RECIPE)
    parts, same = trained(model, examples[:20], replace(RECIPE, micro_batch=micro_batch))
    assert distance(model, parts, whole) < 1e-3
    assert same == pytest.approx(loss, rel=1e-5)


def test_packed_rows_give_the_step_of_padded_ones(model: PeftModel, examples: list[Example]) -> None:
    whole, loss = trained(model, examples[:20], RECIPE)
    packed, same = trained(model, examples[:20], replace(RECIPE, packing=True))
    assert distance(model, packed, whole) < 1e-3
    assert same == pytest.approx(loss, rel=1e-5)
    apart = pack(examples[:2], CPU)
    assert apart.targets.tolist() == [token for e in examples[:2] for token in e.input_ids[e.answer_start :]]


def test_the_loss_is_the_mean_over_rows_of_what_their_batch_has_per_answer_token(
    model: PeftModel, examples: list[Example]
) -> None:
    still = replace(RECIPE, learning_rate=1e-30)
    _, loss = trained(model, examples[:20], still)
    with torch.inference_mode():
        parts = [(len(rows), float(mean_loss(model, collate(rows, 0, CPU)))) for rows in batches(examples[:20], 8)]
    assert loss == pytest.approx(sum(rows * each for rows, each in parts) / 20, rel=1e-5)


def test_the_proximal_term_keeps_the_adapter_near_its_start_and_out_of_the_loss(
    model: PeftModel, examples: list[Example]
) -> None:
    start = initial_adapter(adapter_schema(model), 1)
    free, _ = trained(model, examples[:40], RECIPE)
    held, _ = trained(model, examples[:40], replace(RECIPE, mu=1000.0))
    assert np.linalg.norm(held - start) < 0.8 * np.linalg.norm(free - start)
    _, first = trained(model, examples[:8], replace(RECIPE, mu=1000.0))
    assert first == pytest.approx(trained(model, examples[:8], RECIPE)[1], rel=1e-6)


def test_the_proximal_term_adds_mu_times_the_way_to_the_gradient() -> None:
    parameter, unused = (torch.nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    pull = _proximal([parameter, unused], 0.5)
    with torch.no_grad():
        parameter += torch.tensor([4.0, -2.0])
    parameter.grad = torch.tensor([10.0, 20.0])
    pull()
    assert parameter.grad.tolist() == [12.0, 19.0]
    assert unused.grad is None


PACKABLE = {LlamaConfig: True, GPT2Config: True, OPTConfig: False, BloomConfig: False}


@pytest.mark.parametrize(("kind", "apart"), PACKABLE.items())
def test_model_in_which_packed_rows_see_each_other_is_refused(kind: type, apart: bool) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(kind(**sizes, intermediate_size=32, ffn_dim=32, word_embed_proj_dim=16))
    if apart:
        check_keeps_rows_apart(other)
    else:
        with pytest.raises(UsageError, match="packed rows see each other"):
            check_keeps_rows_apart(other)


def test_only_the_named_tensors_are_trained(model: PeftModel, examples: list[Example]) -> None:
    write_adapter(model, some_adapter(model))
    names = [name for name, _ in adapter_schema(model) if name.endswith("lora_B.weight")]
    train_only(model, names)
    before = read_adapter(model)
    train_steps(model, examples[:8], RECIPE)
    moved = split_flat(read_adapter(model) != before, adapter_schema(model))
    assert {name for name, where in moved.items() if where.any()} == set(names)


def test_checkpointed_activations_give_the_same_step(folder: Path, model: PeftModel, examples: list[Example]) -> None:
    whole, _ = trained(model, examples[:8], RECIPE)
    saving = load_adapter_model(folder, LORA, Compute(precision="float32", gradient_checkpointing=True))
    assert distance(model, trained(saving, examples[:8], RECIPE)[0], whole) < 1e-3


def test_base_in_four_bits_learns_too(folder: Path, examples: list[Example]) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra gpu is not installed")
    small = load_adapter_model(folder, LORA, Compute(four_bit=True))
    weight = small.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert weight.dtype == torch.uint8
    losses = [train_steps(small, examples, replace(RECIPE, learning_rate=1e-2)).loss for _ in range(3)]
    assert losses[2] < 0.8 * losses[0]
    assert {p.dtype for p in small.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be flash attention")
def test_option_that_needs_what_is_not_installed_is_named(folder: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match=r"(?i)flash"):
        load_adapter_model(folder, LORA, Compute(attention="flash"))


def test_a_process_without_rows_computes_a_silent_pass(model: PeftModel, examples: list[Example]) -> None:
    batch = collate(examples[:1], 0, CPU).silent()
    loss = torch.nn.functional.cross_entropy(answer_logits(model, batch).float(), batch.targets, reduction="sum")
    assert float(loss) == 0
    assert all(not gradient.any() for gradient in gradients(loss, model))


@pytest.fixture
def bfloat16_model(folder: Path) -> PeftModel:
    model = add_lora(load_base(folder, torch.bfloat16), LORA)
    write_adapter(model, some_adapter(model))
    return model


def test_without_casts_to_float32_less_is_kept_for_the_same_loss_and_gradients(
    bfloat16_model: PeftModel, examples: list[Example]
) -> None:
    batch = collate(examples[:8], 0, CPU)
    lean_bytes, lean = kept_and_computed(bfloat16_model, batch)
    layers = [layer for layer in bfloat16_model.modules() if hasattr(layer, "cast_input_dtype_enabled")]
    assert len(layers) == 2 * 7
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    cast_bytes, cast = kept_and_computed(bfloat16_model, batch)
    assert all(map(torch.equal, lean, cast))
    assert lean_bytes < cast_bytes


def kept_and_computed(model: PeftModel, batch: Batch) -> tuple[int, list[torch.Tensor]]:
    """Bytes that autograd keeps for the backward pass, each storage once; loss and gradients."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = mean_loss(model, batch)
    return sum(kept.values()), [loss, *gradients(loss, model)]


def test_attention_in_plain_bfloat16_products_agrees_with_the_fused_kernel(
    bfloat16_model: PeftModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(examples[:8], 0, CPU)
    plain = mean_loss(bfloat16_model, batch)
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    monkeypatch.setattr(model_module, "_SHORT", 0)
    fused = mean_loss(bfloat16_model, batch)
    assert not torch.equal(plain, fused)
    torch.testing.assert_close(plain, fused, rtol=1e-2, atol=0)
