"""Training rows to token ids. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from jinja2 import TemplateError
from tokenizers import AddedToken

from mpctf_secure.errors import UsageError
from mpctf_secure.training.rows import HINT, Row, answer_text

_NO_TEMPLATE_HINT = "use an instruction-tuned model, or put another chat_template.jinja into its folder"


@dataclass(frozen=True)
class Example:
    """Token ids; only those from `answer_start` on have a loss.

    They are the answer and its end-of-turn token, or all but the first of a plain text.
    """

    input_ids: tuple[int, ...]
    answer_start: int


class ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: str | None
    eos_token_id: int | None
    added_tokens_decoder: dict[int, AddedToken]

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The conversation as one text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""


def tokenise(rows: Iterable[Row], tokenizer: ChatTokenizer, max_length: int) -> tuple[list[Example], int]:
    """Examples of at most `max_length` tokens, and how many were cut to fit: a prompt's beginning, a text's end.

    UsageError where a conversation meets no usable chat template, an answer leaves no room for any prompt, or a text
    has a single token.
    """
    fitted = [_example(row, tokenizer, max_length) for row in rows]
    return [example for example, _ in fitted], sum(cut for _, cut in fitted)


def _example(row: Row, tokenizer: ChatTokenizer, max_length: int) -> tuple[Example, bool]:
    """With whether it was cut."""
    if row.is_text:
        ids = _encode_text(row, tokenizer)
        return Example(tuple(ids[:max_length]), 1), len(ids) > max_length
    prompt, answer = _encode_turns(row, tokenizer)
    return _fit(row.where, prompt, answer, max_length), len(prompt) + len(answer) > max_length


def _encode_text(row: Row, tokenizer: ChatTokenizer) -> list[int]:
    """With the end-of-text token, where there is one, so that the model learns to stop."""
    ids = tokenizer.encode(answer_text(row), add_special_tokens=True)
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    if len(ids) < 2:
        raise UsageError(f"{row.where}: a text of a single token, nothing to predict", hint="leave the row out")
    return ids


def _encode_turns(row: Row, tokenizer: ChatTokenizer) -> tuple[list[int], list[int]]:
    """Prompt and answer apart, because generation sees the prompt's tokens as they are without the answer."""
    if not tokenizer.chat_template:
        raise UsageError(
            f"{row.where}: only rows of `text` go without a chat template, and the model has none",
            hint=_NO_TEMPLATE_HINT,
        )
    turns = [message._asdict() for message in row.messages]
    try:
        prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    except TemplateError as error:
        raise UsageError(f"{row.where}: the model's chat template refuses it: {error}", hint=HINT) from error
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
