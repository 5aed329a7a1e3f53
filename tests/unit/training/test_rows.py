import contextlib
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.errors import EnvironmentUnfitError, UsageError
from mpctf_secure.training.rows import Message, Row, answer_text, load_rows, to_json

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be kind"}
HI, HELLO = Message("user", "hi"), Message("assistant", "hello")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def chat(*turns: object) -> bytes:
    return json.dumps({"messages": turns}).encode()


def write(folder: Path, suffix: str, content: bytes) -> Path:
    path = folder / f"site{suffix}"
    path.write_bytes(content)
    return path


def in_parquet(columns: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def in_format(suffix: str, rows: list[dict[str, Any]]) -> bytes:
    """Rows of texts, all with the same fields."""
    if suffix == ".parquet":
        return in_parquet({name: [row[name] for row in rows] for name in rows[0]})
    if suffix == ".csv":
        stream = io.StringIO()
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue().encode()
    return (json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))).encode()


GOOD = chat(USER, ASSISTANT)

FORMS = {
    "a chat": ({"messages": [USER, ASSISTANT]}, (HI, HELLO)),
    "a chat with system turn": (
        {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]},
        (Message("system", "be kind"), HI, HELLO, HI, HELLO),
    ),
    "a prompt and its completion": ({"prompt": "hi", "completion": "hello"}, (HI, HELLO)),
    "an instruction with input": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        (Message("user", "Add.\n\n1, 2"), Message("assistant", "3")),
    ),
    "an instruction without input": ({"instruction": "hi", "output": "hello"}, (HI, HELLO)),
    "an instruction with an empty input": ({"instruction": "hi", "input": "", "output": "hello"}, (HI, HELLO)),
    "an instruction with a blank input": ({"instruction": "hi", "input": " ", "output": "hello"}, (HI, HELLO)),
    "a plain text": ({"text": "Once upon a time"}, (Message("text", "Once upon a time"),)),
    "fields of no form beside it": ({"id": 7, "meta": {"a": [1]}, "text": "a"}, (Message("text", "a"),)),
    "null in the fields of another form": ({"text": "a", "prompt": None, "messages": None}, (Message("text", "a"),)),
    "reasoning": (
        {"prompt": "hi", "completion": "<think>\nA greeting.\n</think>\n\nhello"},
        (HI, Message("assistant", "<think>\nA greeting.\n</think>\n\nhello")),
    ),
}


@pytest.mark.parametrize("sentence", FORMS)
def test_a_row_is(tmp_path: Path, sentence: str) -> None:
    content, messages = FORMS[sentence]
    (row,) = load_rows(write(tmp_path, ".jsonl", json.dumps(content).encode()))
    assert row.messages == messages
    assert row.is_text == ("text" in content)
    assert answer_text(row) == messages[-1].content


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("form", ["a prompt and its completion", "an instruction with input", "a plain text"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, form: str) -> None:
    content, messages = FORMS[form]
    rows = load_rows(write(tmp_path, suffix, in_format(suffix, [content] * 3)))
    assert [row.messages for row in rows] == [messages] * 3
    first = 2 if suffix == ".csv" else 1
    assert [row.where for row in rows] == [f"{tmp_path}/site{suffix}, row {first + i}" for i in range(3)]


BAD_LINES = {
    "a line that is not JSON": (b"{'messages': []}", "not JSON"),
    "a line nested too deeply to parse": (b"[" * 100_000, "not JSON"),
    "two objects in a line": (GOOD + b" " + GOOD, "not JSON"),
    "a list in place of an object": (b"[1, 2]", "not a JSON object"),
    "bytes that are not UTF-8": (b'{"prompt": "\xff", "completion": "x"}', "not UTF-8"),
    "a field given twice": (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "'prompt' is there twice"),
    "a field of a turn given twice": (
        b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
        "'role' is there twice",
    ),
    "a field that does not matter given twice": (b'{"text": "a", "id": {"b": 1, "b": 2}}', "'b' is there twice"),
    "no known field": (b'{"id": 7}', "none of 'messages', 'prompt', 'instruction', 'text'"),
    "a known field that is null": (b'{"text": null}', "none of 'messages'"),
    "a prompt without completion": (b'{"prompt": "a"}', "'completion' is missing"),
    "a completion without prompt": (b'{"completion": "a"}', "'prompt' is missing"),
    "an instruction without output": (b'{"instruction": "a", "input": "b"}', "'output' is missing"),
    "an input alone": (b'{"input": "a"}', "'instruction' is missing"),
    "messages and prompt at once": (b'{"messages": [], "prompt": "a"}', "more than one form: 'messages', 'prompt'"),
    "messages and text at once": (b'{"text": "a", "messages": []}', "more than one form: 'messages', 'text'"),
    "a completion and an output": (b'{"output": "a", "completion": "b"}', "more than one form: 'completion', 'output'"),
    "messages that are a text": (b'{"messages": "hi"}', "not a list of objects"),
    "messages that are texts": (b'{"messages": ["hi"]}', "not a list of objects"),
    "no turn at all": (chat(), "roles"),
    "only a system turn": (chat(SYSTEM), "roles"),
    "a user turn at the end": (chat(USER), "roles"),
    "two user turns in a row": (chat(USER, USER, ASSISTANT), "roles"),
    "an assistant who speaks first": (chat(ASSISTANT, USER, ASSISTANT), "roles"),
    "a system turn in the middle": (chat(USER, SYSTEM, ASSISTANT), "roles"),
    "an unknown role": (chat({"role": "tool", "content": "x"}, ASSISTANT), r"messages\[0\].role"),
    "the role of a plain text": (chat({"role": "text", "content": "x"}), r"messages\[0\].role"),
    "a role that is a list": (chat({"role": [], "content": "x"}, ASSISTANT), r"messages\[0\].role"),
    "an empty answer": (chat(USER, {"role": "assistant", "content": " "}), r"messages\[1\].content"),
    "a turn without content": (chat({"role": "user"}, ASSISTANT), r"messages\[0\].content"),
    "an empty completion": (b'{"prompt": "a", "completion": ""}', "completion is missing, empty"),
    "a completion that is a number": (b'{"prompt": "a", "completion": 3}', "not a text"),
    "an input that is a number": (b'{"instruction": "a", "input": 0, "output": "b"}', "input is .*not a text"),
    "a blank text": (b'{"text": "\\n"}', "text is missing, empty"),
    "half a surrogate pair": (b'{"prompt": "\\ud800", "completion": "x"}', "surrogate"),
    "a number too long to be one": (b'{"text": "a", "id": ' + b"1" * 5000 + b"}", "digits"),
}


def load_bad(path: Path, where: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as raised:
        load_rows(path)
    assert raised.value.message.startswith(f"{path}{where}: ")
    assert "\n" not in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("sentence", BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, sentence: str) -> None:
    line, complaint = BAD_LINES[sentence]
    load_bad(write(tmp_path, ".jsonl", b"\n".join([GOOD, b"", line, GOOD])), ", row 3", complaint)


@pytest.mark.parametrize("sentence", sorted(BAD_LINES.keys() - {"bytes that are not UTF-8", "two objects in a line"}))
def test_a_bad_element_of_a_list_is_named(tmp_path: Path, sentence: str) -> None:
    line, complaint = BAD_LINES[sentence]
    load_bad(write(tmp_path, ".json", b"[" + b",\n\n".join([GOOD, line, GOOD]) + b"]"), ", row 2", complaint)


BAD_LISTS = {
    "an object": (GOOD, "", "not a JSON list"),
    "nothing": (b"", "", "not a JSON list"),
    "bytes that are not UTF-8": (b"[" + GOOD + b"\xff]", "", "not UTF-8"),
    "two objects without comma": (b"[" + GOOD + GOOD + b"]", ", row 2", "not a JSON list"),
    "a comma before the end": (b"[" + GOOD + b",]", ", row 2", "not JSON"),
    "no end": (b"[" + GOOD, ", row 2", "not a JSON list"),
    "something after the end": (b"[" + GOOD + b"] []", ", row 2", "not a JSON list"),
}


@pytest.mark.parametrize("sentence", BAD_LISTS)
def test_json_is_refused_that_is(tmp_path: Path, sentence: str) -> None:
    content, where, complaint = BAD_LISTS[sentence]
    load_bad(write(tmp_path, ".json", content), where, complaint)


BAD_CSV = {
    "a column twice": (b"text,id,text\na,1,b\n", 1, "'text' is there twice"),
    "conversations": (b'id,messages\n1,"[{}]"\n', 1, "'messages' in a CSV cell is not supported"),
    "no known column": (b"a,b\n1,2\n", 2, "none of 'messages'"),
    "half of a form": (b"id,prompt\n1,2\n", 2, "'completion' is missing"),
    "a row of two forms": (
        b"text,prompt,completion\na,,\nb,c,d\n",
        3,
        "more than one form: 'prompt', 'completion', 'text'",
    ),
    "too few fields": (b"prompt,completion\na,b\na\n", 3, "1 fields, but the header has 2"),
    "too many fields": (b"text\na\nb\nc,d\n", 4, "2 fields, but the header has 1"),
    "too many fields after blank lines": (b"\n\ntext\n\na\n\nb,c\n", 7, "2 fields"),
    "an empty cell": (b"prompt,completion\na,b\na,\n", 3, "'completion' is missing"),
    "an empty cell after a field of three lines": (
        b'prompt,completion\r\n"a\r\nb\nc",d\r\ne,""\r\nf,g\r\n',
        5,
        "'completion' is missing",
    ),
    "a blank cell in a record of three lines": (
        b'prompt,completion\na,b\n"c\n\nd"," "\ne,f\n',
        3,
        "completion is missing, empty",
    ),
    "a NUL byte": (b"text\na\nb\0\n", 3, "NUL"),
    "a NUL byte in the header": (b"te\0xt\na\n", 1, "NUL"),
    "a NUL byte in the third line of a field": (b'text\na\n"b\nc\n\0"\nd\n', 3, "NUL"),
    "bytes that are not UTF-8": (b"text\na\nb\n\xff\nc\n", 4, "not UTF-8"),
    "UTF-16": ("text\na\n".encode("utf-16"), 1, "not UTF-8"),
    "a byte order mark in the middle": (b"text\na\n\xef\xbb\xbf,b\n", 3, "2 fields"),
    "a quote that never ends": (b'text\na\n"b\nc\nd\n', 3, "not CSV: unexpected end"),
    "a quote that ends early": (b'text\n"a"b\n', 2, "not CSV: ',' expected after"),
    "lines that end as on old Macintoshes": (b"text\ra\rb\r", 1, "not CSV: new-line"),
    "a field larger than Python's csv takes": (b"text\n" + b"a" * (1 << 17) + b"b\n", 2, "not CSV: field larger"),
}


@pytest.mark.parametrize("sentence", BAD_CSV)
def test_csv_is_refused_with(tmp_path: Path, sentence: str) -> None:
    content, row, complaint = BAD_CSV[sentence]
    load_bad(write(tmp_path, ".csv", content), f", row {row}", complaint)


def test_csv_takes_a_byte_order_mark_and_fields_of_many_lines(tmp_path: Path) -> None:
    content = '\ufeffprompt,completion\r\n"a ""b"",\r\nc",d\r\n\r\n\ufeffe\u2028,f\x85\r\n'
    rows = load_rows(write(tmp_path, ".csv", content.encode()))
    assert [[message.content for message in row.messages] for row in rows] == [
        ['a "b",\r\nc', "d"],
        ["\ufeffe\u2028", "f\x85"],
    ]
    assert [row.where.rpartition(" ")[2] for row in rows] == ["2", "5"]


@pytest.mark.parametrize(("suffix", "content"), [(".jsonl", b'{"text": "a"}\n'), (".json", b'[{"text": "a"}]')])
def test_json_takes_a_byte_order_mark(suffix: str, content: bytes, tmp_path: Path) -> None:
    (row,) = load_rows(write(tmp_path, suffix, "\ufeff".encode() + content))
    assert row.messages[0].content == "a"


BAD_TABLES = {
    "a column twice": (pyarrow.table([["a"], ["b"]], names=["text", "text"]), "", "'text' is there twice"),
    "no known column": ({"id": [1]}, ", row 1", "none of 'messages'"),
    "null": ({"text": ["a", None]}, ", row 2", "none of 'messages'"),
    "a number": ({"text": [7]}, ", row 1", "text is missing, empty or not a text"),
    "bytes": ({"text": [b"a"]}, ", row 1", "text is missing, empty or not a text"),
    "a time that Python cannot tell": (
        {"text": pyarrow.array([1 << 62], pyarrow.timestamp("ms"))},
        ", row 1",
        "not Parquet, or damaged",
    ),
    "text that is not UTF-8": (
        {"text": pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())},
        ", row 2",
        "not Parquet, or damaged: .*utf-8",
    ),
    "an empty turn in a late row": (
        {"messages": [[USER, ASSISTANT]] * 3000 + [[USER, {"role": "assistant", "content": ""}]]},
        ", row 3001",
        r"messages\[1\].content",
    ),
    "a turn that is null": ({"messages": [[USER, None]]}, ", row 1", "not a list of objects"),
}


@pytest.mark.parametrize("sentence", BAD_TABLES)
def test_parquet_is_refused_with(tmp_path: Path, sentence: str) -> None:
    columns, where, complaint = BAD_TABLES[sentence]
    load_bad(write(tmp_path, ".parquet", in_parquet(columns)), where, complaint)


@pytest.mark.parametrize("damage", [slice(0), slice(20), slice(-9, None)], ids=["nothing", "its start", "its end"])
def test_parquet_of_which_only_a_part_is_left_is_refused(tmp_path: Path, damage: slice) -> None:
    content = in_parquet({"text": ["a"]})[damage]
    load_bad(write(tmp_path, ".parquet", content), "", "not Parquet, or damaged")


def test_parquet_holds_conversations_beside_columns_that_do_not_matter(tmp_path: Path) -> None:
    turn = {"content": "hello", "name": None, "role": "assistant"}
    unreadable = pyarrow.array([1 << 62], pyarrow.timestamp("ms"))
    content = in_parquet({"when": unreadable, "messages": [[USER, turn]], "text": pyarrow.array([None], "string")})
    (row,) = load_rows(write(tmp_path, ".parquet", content))
    assert row.messages == (HI, HELLO)


def test_without_pyarrow_only_parquet_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(EnvironmentUnfitError, match="pyarrow is not installed") as raised:
        load_rows(write(tmp_path, ".parquet", in_parquet({"text": ["a"]})))
    assert raised.value.hint == "pip install 'mpctf-secure[parquet]'"
    assert load_rows(write(tmp_path, ".csv", b"text\na\n"))


EMPTY = {
    "JSONL without a line": (".jsonl", b""),
    "JSONL of blank lines": (".jsonl", b"\n  \n"),
    "an empty list": (".json", b" [ ] \n"),
    "CSV without a line": (".csv", b""),
    "CSV of blank lines": (".csv", b"\n\r\n"),
    "CSV of a header": (".csv", b"text\n"),
    "Parquet without rows": (".parquet", in_parquet({"text": pyarrow.array([], "string")})),
}


@pytest.mark.parametrize("sentence", EMPTY)
def test_a_file_without_rows_is_refused(tmp_path: Path, sentence: str) -> None:
    load_bad(write(tmp_path, *EMPTY[sentence]), "", "no rows")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    load_bad(tmp_path / f"gone{suffix}", "", "No such file")


@pytest.mark.parametrize("name", ["site.txt", "site", "site.jsonl.gz"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=name) as raised:
        load_rows(tmp_path / name)
    assert raised.value.hint == "the name ends in .jsonl, .json, .csv, .parquet"


def test_line_separators_inside_a_text_do_not_split_a_row(tmp_path: Path) -> None:
    pair = json.dumps({"prompt": "a\u2028b", "completion": "c\x85d"}, ensure_ascii=False).encode()
    assert answer_text(load_rows(write(tmp_path, ".jsonl", pair))[0]) == "c\x85d"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def load_or_refuse(path: Path) -> None:
    with contextlib.suppress(UsageError):
        assert load_rows(path)


@given(st.sampled_from(SUFFIXES), st.binary(max_size=200))
def test_any_bytes_give_rows_or_a_usage_error(folder: Path, suffix: str, content: bytes) -> None:
    load_or_refuse(write(folder, suffix, content))


GOOD_FILES = {suffix: in_format(suffix, [{"prompt": "hi\n,\"'", "completion": "é"}] * 3) for suffix in SUFFIXES}


@given(st.sampled_from(SUFFIXES), st.floats(0, 1), st.floats(0, 0.1), st.binary(max_size=6))
def test_a_damaged_file_gives_rows_or_a_usage_error(
    folder: Path, suffix: str, place: float, share: float, put: bytes
) -> None:
    content = GOOD_FILES[suffix]
    begin = int(place * len(content))
    load_or_refuse(write(folder, suffix, content[:begin] + put + content[begin + int(share * len(content)) :]))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
PAIRS = st.tuples(TEXTS.map(lambda text: Message("user", text)), TEXTS.map(lambda text: Message("assistant", text)))
CHATS = st.lists(PAIRS, min_size=1, max_size=3).map(lambda pairs: tuple(turn for pair in pairs for turn in pair))
PLAIN = TEXTS.map(lambda text: (Message("text", text),))


@given(st.lists(CHATS | PLAIN, min_size=1))
def test_rows_written_as_json_read_back_equal(folder: Path, rows: list[tuple[Message, ...]]) -> None:
    path = folder / "written.jsonl"
    path.write_text("".join(f"{to_json(Row(messages, ''))}\n" for messages in rows), encoding="utf-8")
    assert [row.messages for row in load_rows(path)] == rows


@given(st.sampled_from(SUFFIXES), st.lists(TEXTS.filter(lambda text: "\0" not in text), min_size=1))
def test_any_text_survives_every_format(folder: Path, suffix: str, texts: list[str]) -> None:
    rows = load_rows(write(folder, suffix, in_format(suffix, [{"text": text} for text in texts])))
    assert [answer_text(row) for row in rows] == texts
