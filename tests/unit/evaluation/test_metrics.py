from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from mpctf_secure.config.run import Lora
from mpctf_secure.evaluation.metrics import exact_match
from mpctf_secure.experiments.intents import write_intents
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.training.data import Example, tokenise
from mpctf_secure.training.loop import Recipe, train_steps
from mpctf_secure.training.model import add_lora, load_base
from mpctf_secure.training.rows import load_rows

ROWS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_intents(folder / "data", ["a", "b"], ROWS, 24, 0)
    write_tiny_llama(folder, (folder / "data" / "a.jsonl").read_text().splitlines())
    return folder


def greedy_match(model: Any, examples: list[Example], pad_id: int, end_id: int) -> float:
    """What `exact_match` claims to equal, the slow way."""
    right = 0
    for example in examples:
        gold = list(example.input_ids[example.answer_start :])
        prompt = torch.tensor([example.input_ids[: example.answer_start]])
        answer = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(gold),
            do_sample=False,
            pad_token_id=pad_id,
            eos_token_id=end_id,
        )
        right += answer[0, prompt.shape[1] :].tolist() == gold
    return right / len(examples)


def test_teacher_forced_exact_match_is_that_of_greedy_decoding(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    examples, _ = tokenise(load_rows(folder / "data" / "a.jsonl"), tokenizer, 256)
    torch.manual_seed(0)
    model = add_lora(load_base(folder, torch.float32), Lora(r=8, alpha=16))
    assert exact_match(model, examples, 8, pad) == 0
    shares = []
    for _ in range(3):
        train_steps(model, examples, Recipe(batch_size=4, epochs=4, learning_rate=1e-2, pad_id=pad))
        shares.append(exact_match(model, examples, 8, pad))
        assert shares[-1] == greedy_match(model, examples, pad, end)
    assert any(0 < share < 1 for share in shares)


def test_neither_batch_size_nor_order_matter(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples, _ = tokenise(load_rows(folder / "data" / "a.jsonl"), tokenizer, 256)
    model = add_lora(load_base(folder, torch.float32), Lora(r=8, alpha=16))
    train_steps(model, examples, Recipe(batch_size=4, epochs=4, learning_rate=1e-2, pad_id=0))
    assert exact_match(model, examples, 3, 0) == exact_match(model, examples[::-1], 32, 0)
