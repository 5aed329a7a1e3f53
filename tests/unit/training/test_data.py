from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from mpctf_secure.errors import UsageError
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.training.data import tokenise
from mpctf_secure.training.rows import Message, Row

USER, ASSISTANT = Message("user", "hi"), Message("assistant", "hello")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(folder, ["hi hello be kind what is next"])
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def row() -> Row:
    turns = (Message("system", "be kind"), USER, Message("assistant", "first"), USER, ASSISTANT)
    return Row(turns, "site.jsonl, row 1")


def test_only_the_last_answer_and_its_end_of_turn_are_learnt(tokenizer: Any, row: Row) -> None:
    (example,), truncated = tokenise([row], tokenizer, 200)
    assert tokenizer.decode(example.input_ids[example.answer_start :]) == "hello<|im_end|>"
    prompt = tokenizer.decode(example.input_ids[: example.answer_start])
    assert prompt.endswith("first<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert truncated == 0


def test_the_beginning_of_a_long_prompt_is_cut_and_counted(tokenizer: Any, row: Row) -> None:
    (whole,), _ = tokenise([row], tokenizer, 200)
    (cut, _), truncated = tokenise([row, row], tokenizer, len(whole.input_ids) - 3)
    assert cut.input_ids == whole.input_ids[3:]
    assert cut.answer_start == whole.answer_start - 3
    assert truncated == 2


def test_the_limit_itself_is_not_truncated(tokenizer: Any, row: Row) -> None:
    (whole,), _ = tokenise([row], tokenizer, 200)
    assert tokenise([row], tokenizer, len(whole.input_ids)) == ([whole], 0)


def test_an_answer_is_never_cut(tokenizer: Any, row: Row) -> None:
    (whole,), _ = tokenise([row], tokenizer, 200)
    answer = len(whole.input_ids) - whole.answer_start
    (shortest,), _ = tokenise([row], tokenizer, answer + 1)
    assert shortest.input_ids == whole.input_ids[-answer - 1 :]
    with pytest.raises(UsageError, match=r"site\.jsonl, row 1: the answer has"):
        tokenise([row], tokenizer, answer)


UNFIT_TEMPLATES = {
    "there is none": (None, "row 1: .* and the model has none"),
    "it refuses a role": ("{{ raise_exception('no system role') }}", "row 1: .*no system role"),
    "it rewrites the prompt": (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "row 1: .*rewrites the prompt",
    ),
}


@pytest.mark.parametrize("sentence", UNFIT_TEMPLATES)
def test_a_chat_template_is_unfit_where(
    tokenizer: Any, row: Row, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, complaint = UNFIT_TEMPLATES[sentence]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UsageError, match=complaint):
        tokenise([row], tokenizer, 200)


def test_a_template_without_end_of_turn_keeps_the_whole_answer(
    tokenizer: Any, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}|{% endfor %}")
    (example,), _ = tokenise([row], tokenizer, 200)
    assert tokenizer.decode(example.input_ids[example.answer_start :]) == "hello|"


def text(content: str) -> Row:
    return Row((Message("text", content),), "site.csv, row 5")


def test_a_plain_text_is_learnt_whole_and_up_to_its_end(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    (example,), truncated = tokenise([text("be kind")], tokenizer, 200)
    assert tokenizer.decode(example.input_ids) == "be kind<|im_end|>"
    assert (example.answer_start, truncated) == (1, 0)


def test_a_text_that_has_its_end_gets_no_second(tokenizer: Any) -> None:
    ended = text("be kind<|im_end|>")
    assert tokenise([ended], tokenizer, 200) == tokenise([text("be kind")], tokenizer, 200)


def test_the_special_tokens_of_a_text_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, ["be kind"])
    path = tmp_path / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    backend.save(str(path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (example,), _ = tokenise([text("be kind")], tokenizer, 200)
    assert tokenizer.decode(example.input_ids) == "<|im_start|>be kind<|im_end|>"
    assert example.answer_start == 1


def test_the_end_of_a_long_text_is_cut_and_counted(tokenizer: Any) -> None:
    long, short = text("what is next " * 9), text("hi")
    (whole,), _ = tokenise([long], tokenizer, 200)
    length = len(whole.input_ids)
    assert tokenise([long], tokenizer, length) == ([whole], 0)
    (cut, kept), truncated = tokenise([long, short], tokenizer, length - 1)
    assert (cut.input_ids, cut.answer_start) == (whole.input_ids[:-1], 1)
    assert ([kept], truncated) == (tokenise([short], tokenizer, 200)[0], 1)


def test_a_text_of_one_token_is_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, ["hi"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, eos_token=None)
    (example,), _ = tokenise([text("hi h")], tokenizer, 200)
    assert tokenizer.decode(example.input_ids) == "hi h"
    with pytest.raises(UsageError, match=r"site\.csv, row 5: a text of a single token"):
        tokenise([text("h")], tokenizer, 200)
