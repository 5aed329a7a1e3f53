"""Training rows: JSONL to conversations, conversations to token ids. No torch."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from jinja2 import TemplateError
from tokenizers import AddedToken

from mpctf_secure.errors import UsageError

_HINT = (
    'a row is {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]} '
    'or {"prompt": …, "completion": …}'
)

_NO_TEMPLATE_HINT = "use an instruction-tuned model, or put another chat_template.jinja into its folder"
_ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn; the role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One conversation that ends with the assistant's answer; `where` names file and row for errors."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True)
class Example:
    """Token ids; those from `answer_start` on are the answer and its end-of-turn token, the only ones with a loss."""

    input_ids: tuple[int, ...]
    answer_start: int


class ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: str | None
    added_tokens_decoder: dict[int, AddedToken]

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The conversation as one text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""


def load_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file, blank lines left out; UsageError names the first bad row, counted in lines from 1."""
    try:
        rows = list(_parse_lines(path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="check the path of the data file") from error
    if not rows:
        raise UsageError(f"{path}: no rows", hint=_HINT)
    return rows


def _parse_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _parse_row(line, f"{path}, row {number}")


def _parse_row(line: bytes, where: str) -> Row:
    try:
        messages = _messages(_parse_object(line))
    except ValueError as error:
        raise UsageError(f"{where}: {error}", hint=_HINT) from error
    return Row(messages, where)


def _parse_object(line: bytes) -> dict[str, object]:
    try:
        content = json.loads(line.decode(), object_pairs_hook=_object_without_duplicates)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def _messages(content: dict[str, object]) -> tuple[Message, ...]:
    """Fields that are none of the three, such as an id, are left alone."""
    given = content.keys() & {"messages", "prompt", "completion"}
    if given == {"messages"}:
        return _chat(content["messages"])
    if given == {"prompt", "completion"}:
        return (
            _message("user", content["prompt"], "prompt"),
            _message("assistant", content["completion"], "completion"),
        )
    if "messages" in given:
        raise ValueError("both 'messages' and 'prompt' or 'completion'")
    missing = "'messages'" if not given else repr(({"prompt", "completion"} - given).pop())
    raise ValueError(f"{missing} is missing")


def _chat(turns: object) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("'messages' is not a list of objects")
    messages = tuple(_turn(turn, f"messages[{i}]") for i, turn in enumerate(turns))
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError("the roles are not: system if at all, then user and assistant in turn, assistant last")
    return messages


def _turn(turn: dict[str, object], name: str) -> Message:
    role = turn.get("role")
    if role not in _ROLES:
        raise ValueError(f"{name}.role is none of {', '.join(_ROLES)}")
    return _message(str(role), turn.get("content"), f"{name}.content")


def _message(role: str, content: object, name: str) -> Message:
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{name} is missing, empty or not a text")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise ValueError(f"{name} holds half a surrogate pair")
    return Message(role, content)


def answer_text(row: Row) -> str:
    """The last turn."""
    return row.messages[-1].content


def tokenise(rows: Iterable[Row], tokenizer: ChatTokenizer, max_length: int) -> tuple[list[Example], int]:
    """Examples of at most `max_length` tokens, and how many lost the beginning of their prompt to fit.

    UsageError where the tokenizer has no usable chat template or an answer leaves no room for any prompt.
    """
    if not tokenizer.chat_template:
        raise UsageError("the model's tokenizer has no chat template", hint=_NO_TEMPLATE_HINT)
    encoded = [(row.where, *_encode(row, tokenizer)) for row in rows]
    truncated = sum(len(prompt) + len(answer) > max_length for _, prompt, answer in encoded)
    return [_fit(where, prompt, answer, max_length) for where, prompt, answer in encoded], truncated


def _encode(row: Row, tokenizer: ChatTokenizer) -> tuple[list[int], list[int]]:
    """Prompt and answer apart, because generation sees the prompt's tokens as they are without the answer."""
    turns = [message._asdict() for message in row.messages]
    try:
        prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    except TemplateError as error:
        raise UsageError(f"{row.where}: the model's chat template refuses it: {error}", hint=_HINT) from error
    if not full.startswith(prompt):
        raise UsageError(f"{row.where}: the model's chat template rewrites the prompt", hint=_NO_TEMPLATE_HINT)
    answer = tokenizer.encode(full.removeprefix(prompt), add_special_tokens=False)
    return tokenizer.encode(prompt, add_special_tokens=False), _up_to_end_of_turn(answer, tokenizer)


def _up_to_end_of_turn(answer: list[int], tokenizer: ChatTokenizer) -> list[int]:
    """Templates write a line break after the end-of-turn token; generation has stopped by then."""
    special = (i for i, token in enumerate(answer, 1) if _is_special(token, tokenizer))
    return answer[: max(special, default=len(answer))]


def _is_special(token: int, tokenizer: ChatTokenizer) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and added.special


def _fit(where: str, prompt: list[int], answer: list[int], max_length: int) -> Example:
    room = max_length - len(answer)
    if room < 1:
        raise UsageError(
            f"{where}: the answer has {len(answer)} tokens, the limit is {max_length} with the prompt",
            hint="shorten the answer or raise max_length",
        )
    kept = prompt[-room:]
    return Example((*kept, *answer), len(kept))
