"""Training rows: JSONL, JSON, CSV or Parquet to conversations and plain texts. No torch, no tokenizer."""

import contextlib
import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mpctf_secure.errors import EnvironmentUnfitError, UsageError

HINT = (
    'a row has messages [{"role": "user", "content": …}, {"role": "assistant", "content": …}], '
    "or prompt and completion, or instruction, input if any and output, or text"
)
"""For a row that cannot be used."""

_ROLES = ("system", "user", "assistant")
_TEXT = "text"
_MARK = "\ufeff"  # with which some programs begin a file
_OPTIONAL = "input"
_BATCH = 1024  # rows of a Parquet file in memory beside those that were read

_Fields = dict[str, object]


class Message(NamedTuple):
    """One turn; the role is system, user or assistant, or `text` for a plain text."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """A conversation that ends with the assistant's answer, or one message of role `text`; `where` is for errors."""

    messages: tuple[Message, ...]
    where: str

    @property
    def is_text(self) -> bool:
        """Whether it is a plain text and no conversation."""
        return self.messages[0].role == _TEXT


def load_rows(path: Path) -> list[Row]:
    """The rows of a file whose suffix names its format; UsageError names the first bad row, counted from 1.

    The number is that of the row's first line in JSONL, where blank lines are left out, and in CSV.
    EnvironmentUnfitError for Parquet without pyarrow.
    """
    if path.suffix not in _READERS:
        raise UsageError(f"{path}: not a format of data files", hint=f"the name ends in {', '.join(_READERS)}")
    try:
        rows = list(_READERS[path.suffix](path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="check the path of the data file") from error
    if not rows:
        raise UsageError(f"{path}: no rows", hint=HINT)
    return rows


def answer_text(row: Row) -> str:
    """The last turn, or the whole plain text."""
    return row.messages[-1].content


def to_json(row: Row) -> str:
    """A line of JSONL, without its end, that reads back as the same messages."""
    if row.is_text:
        return json.dumps({"text": answer_text(row)})
    return json.dumps({"messages": [message._asdict() for message in row.messages]})


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """A ValueError inside becomes a UsageError about that place."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{where}: {error}", hint=HINT) from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                where = f"{path}, row {number}"
                with _naming(where):
                    yield Row(_messages(_parse_line(line)), where)


def _parse_line(line: bytes) -> _Fields:
    text = _decode(line.strip()).removeprefix(_MARK)
    content, end = _parse_object(text, 0)
    if end < len(text):
        raise ValueError("not JSON")
    return content


def _decode(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error


def _parse_object(text: str, position: int) -> tuple[_Fields, int]:
    """The JSON object that begins there, and where it ends."""
    try:
        content, end = _DECODER.raw_decode(text, position)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content, end


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> _Fields:
    _check_unique([name for name, _ in pairs])
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_object_without_duplicates)


def _check_unique(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")


def _read_json(path: Path) -> Iterator[Row]:
    with _naming(str(path)):
        text = _decode(path.read_bytes()).removeprefix(_MARK)
        start = _skip(_OPENING, text, 0)
    return _count_rows(path, _parse_elements(text, start))


_OPENING = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_CLOSING = re.compile(r"[ \t\n\r]*\][ \t\n\r]*\Z")


def _skip(mark: re.Pattern[str], text: str, position: int) -> int:
    found = mark.match(text, position)
    if found is None:
        raise ValueError("not a JSON list of objects")
    return found.end()


def _parse_elements(text: str, position: int) -> Iterator[_Fields]:
    """One by one, not the list as a whole, so that an error is that of one element."""
    if _CLOSING.match(text, position):
        return
    while True:
        content, position = _parse_object(text, position)
        yield content
        if _CLOSING.match(text, position):
            return
        position = _skip(_COMMA, text, position)


def _count_rows(path: Path, records: Iterator[_Fields]) -> Iterator[Row]:
    """Rows counted from 1; an error in reading a record is told as that row's."""
    for number in itertools.count(1):
        where = f"{path}, row {number}"
        with _naming(where):
            content = next(records, None)
            if content is None:
                return
            yield Row(_messages(content), where)


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        records = _parse_records(path, stream)
        where, names = next(records, (str(path), []))
        with _naming(where):
            _check_header(names)
        for where, cells in records:
            with _naming(where):
                yield Row(_messages(_fields(names, cells)), where)


def _parse_records(path: Path, stream: BinaryIO) -> Iterator[tuple[str, list[str]]]:
    """Where each record begins, and its cells; blank lines are left out."""
    reader = csv.reader(_decode_lines(stream), strict=True)
    while True:
        where = f"{path}, row {reader.line_num + 1}"  # so far the last line of the record before
        with _naming(where):
            cells = _next_record(reader)
        if cells is None:
            return
        if cells:
            yield where, cells


def _decode_lines(stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream):
        text = _decode(line)
        if "\0" in text:
            raise ValueError("a NUL byte")
        yield text if number else text.removeprefix(_MARK)


def _next_record(reader: Iterator[list[str]]) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise ValueError(f"not CSV: {error}") from error


def _check_header(names: list[str]) -> None:
    _check_unique(names)
    if "messages" in names:
        raise ValueError("'messages' in a CSV cell is not supported, put conversations into JSONL")


def _fields(names: list[str], cells: list[str]) -> _Fields:
    """An empty cell is a missing field."""
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} fields, but the header has {len(names)}")
    return {name: cell for name, cell in zip(names, cells, strict=True) if cell}


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow.parquet import ParquetFile  # noqa: PLC0415  # optional
    except ImportError as error:
        raise EnvironmentUnfitError(
            f"{path}: pyarrow is not installed", hint="pip install 'mpctf-secure[parquet]'"
        ) from error
    with path.open("rb") as stream:
        with _naming(str(path)):
            with _refusing_damage():
                file = ParquetFile(stream)
            _check_unique(file.schema_arrow.names)
        yield from _count_rows(path, _parse_batches(file))


def _parse_batches(file: Any) -> Iterator[_Fields]:
    """Only the columns that make a row: others may be large, or of types without a Python value."""
    known = [name for name in file.schema_arrow.names if any(name in form.fields for form in _FORMS)]
    with _refusing_damage():
        for batch in file.iter_batches(_BATCH, columns=known):
            for index in range(batch.num_rows):
                yield {name: batch.column(name)[index].as_py() for name in batch.schema.names}


@contextlib.contextmanager
def _refusing_damage() -> Iterator[None]:
    """What pyarrow raises at damaged files and at values it cannot convert has no common class."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"not Parquet, or damaged: {reason}") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


class _Form(NamedTuple):
    """One way to write a row."""

    fields: tuple[str, ...]
    read: Callable[[_Fields], tuple[Message, ...]]


def _messages(content: _Fields) -> tuple[Message, ...]:
    """Fields of no form, such as an id, are left alone; null is as good as missing."""
    given = {name: value for name, value in content.items() if value is not None}
    form = _only_form(given)
    for name in form.fields:
        if name not in given and name != _OPTIONAL:
            raise ValueError(f"{name!r} is missing")
    return form.read(given)


def _only_form(given: _Fields) -> _Form:
    begun = {name: form for form in _FORMS for name in form.fields if name in given}
    forms = set(begun.values())
    if not forms:
        raise ValueError(f"none of {', '.join(repr(form.fields[0]) for form in _FORMS)} is there")
    if len(forms) > 1:
        raise ValueError(f"fields of more than one form: {', '.join(map(repr, begun))}")
    return forms.pop()


def _chat(given: _Fields) -> tuple[Message, ...]:
    turns = given["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("'messages' is not a list of objects")
    messages = tuple(_turn(turn, f"messages[{i}]") for i, turn in enumerate(turns))
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError("the roles are not: system if at all, then user and assistant in turn, assistant last")
    return messages


def _turn(turn: _Fields, name: str) -> Message:
    role = turn.get("role")
    if role not in _ROLES:
        raise ValueError(f"{name}.role is none of {', '.join(_ROLES)}")
    return Message(str(role), _text(turn.get("content"), f"{name}.content"))


def _pair(given: _Fields) -> tuple[Message, ...]:
    return (
        Message("user", _text(given["prompt"], "prompt")),
        Message("assistant", _text(given["completion"], "completion")),
    )


def _alpaca(given: _Fields) -> tuple[Message, ...]:
    """The input, where it is not empty, follows the instruction after a blank line."""
    asked, more = _text(given["instruction"], "instruction"), given.get("input", "")
    if not isinstance(more, str) or more.strip():
        asked += "\n\n" + _text(more, "input")
    return Message("user", asked), Message("assistant", _text(given["output"], "output"))


def _plain(given: _Fields) -> tuple[Message, ...]:
    return (Message(_TEXT, _text(given["text"], "text")),)


def _text(content: object, name: str) -> str:
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{name} is missing, empty or not a text")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise ValueError(f"{name} holds half a surrogate pair")
    return content


_FORMS = (
    _Form(("messages",), _chat),
    _Form(("prompt", "completion"), _pair),
    _Form(("instruction", "input", "output"), _alpaca),
    _Form(("text",), _plain),
)
