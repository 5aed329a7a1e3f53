import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mpctf_secure.errors import UsageError
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.training.data import Row, answer_text, load_rows, tokenise

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be kind"}


def chat(*turns: object) -> bytes:
    return json.dumps({"messages": turns}).encode()


GOOD = chat(USER, ASSISTANT)

BAD_ROWS = {
    "a line that is not JSON": (b"{'messages': []}", "not JSON"),
    "a line nested too deeply to parse": (b"[" * 100_000, "not JSON"),
    "a list in place of an object": (b"[1, 2]", "not a JSON object"),
    "bytes that are not UTF-8": (b'{"prompt": "\xff", "completion": "x"}', "not UTF-8"),
    "a field given twice": (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "'prompt' is there twice"),
    "a field of a turn given twice": (
        b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
        "'role' is there twice",
    ),
    "no known field": (b'{"text": "a"}', "'messages' is missing"),
    "a prompt without completion": (b'{"prompt": "a"}', "'completion' is missing"),
    "a completion without prompt": (b'{"completion": "a"}', "'prompt' is missing"),
    "both formats at once": (b'{"messages": [], "prompt": "a"}', "both"),
    "messages that are a text": (b'{"messages": "hi"}', "not a list of objects"),
    "messages that are texts": (b'{"messages": ["hi"]}', "not a list of objects"),
    "no turn at all": (chat(), "roles"),
    "only a system turn": (chat(SYSTEM), "roles"),
    "a user turn at the end": (chat(USER), "roles"),
    "two user turns in a row": (chat(USER, USER, ASSISTANT), "roles"),
    "an assistant who speaks first": (chat(ASSISTANT, USER, ASSISTANT), "roles"),
    "a system turn in the middle": (chat(USER, SYSTEM, ASSISTANT), "roles"),
    "an unknown role": (chat({"role": "tool", "content": "x"}, ASSISTANT), r"messages\[0\].role"),
    "a role that is a list": (chat({"role": [], "content": "x"}, ASSISTANT), r"messages\[0\].role"),
    "an empty answer": (chat(USER, {"role": "assistant", "content": " "}), r"messages\[1\].content"),
    "a turn without content": (chat({"role": "user"}, ASSISTANT), r"messages\[0\].content"),
    "an empty completion": (b'{"prompt": "a", "completion": ""}', "completion is missing, empty"),
    "a completion that is a number": (b'{"prompt": "a", "completion": 3}', "not a text"),
    "half a surrogate pair": (b'{"prompt": "\\ud800", "completion": "x"}', "surrogate"),
}


def write(folder: Path, *lines: bytes) -> Path:
    path = folder / "site.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.mark.parametrize("sentence", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_row(tmp_path: Path, sentence: str) -> None:
    line, complaint = BAD_ROWS[sentence]
    with pytest.raises(UsageError, match=complaint) as raised:
        load_rows(write(tmp_path, GOOD, b"", line, GOOD))
    assert "site.jsonl, row 3: " in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("lines", [(), (b"", b"  ")], ids=["no line", "blank lines"])
def test_a_file_without_rows_is_refused(tmp_path: Path, lines: tuple[bytes, ...]) -> None:
    with pytest.raises(UsageError, match=r"site\.jsonl: no rows"):
        load_rows(write(tmp_path, *lines))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.jsonl: No such file"):
        load_rows(tmp_path / "gone.jsonl")


def test_both_formats_give_conversations(tmp_path: Path) -> None:
    pair = b'{"id": 7, "prompt": "hi", "completion": "hello"}'
    first, second = load_rows(write(tmp_path, GOOD, pair))
    assert first.messages == second.messages
    assert answer_text(second) == "hello"


def test_line_separators_inside_a_text_do_not_split_a_row(tmp_path: Path) -> None:
    pair = json.dumps({"prompt": "a\u2028b", "completion": "c\x85d"}, ensure_ascii=False).encode()
    assert answer_text(load_rows(write(tmp_path, pair))[0]) == "c\x85d"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(folder, ["hi hello be kind what is next"])
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def row(tmp_path: Path) -> Row:
    turns = [SYSTEM, USER, {"role": "assistant", "content": "first"}, USER, ASSISTANT]
    return load_rows(write(tmp_path, chat(*turns)))[0]


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
    "there is none": (None, "no chat template"),
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
