"""Examples to tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mpctf_secure.training.data import Example

_WINDOW = 8


@dataclass(frozen=True)
class Batch:
    """`input_ids` (rows, length), padded on the right; `predicts` (rows, length − 1), true where the next token counts.

    No attention mask: in a causal model no real token sees the padding to its right. Packed, there is one row, and
    `positions` (1, length) begin again with each of those in it, from which the model sees that they are apart.
    """

    input_ids: torch.Tensor
    predicts: torch.Tensor
    positions: torch.Tensor | None = None

    @property
    def targets(self) -> torch.Tensor:
        """The answer tokens, 1-D, in the order of `predicts`."""
        return self.input_ids[:, 1:][self.predicts]

    def silent(self) -> "Batch":
        """The same rows, none of whose tokens count."""
        return replace(self, predicts=torch.zeros_like(self.predicts))


def batches(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    """The rows in batches, the last with fewer where they run out.

    Within windows of 8 batches rows are sorted by length (stably): a sixth less time in training, for want of padding.
    """
    for start in range(0, len(examples), _WINDOW * batch_size):
        window = sorted(examples[start : start + _WINDOW * batch_size], key=lambda example: len(example.input_ids))
        for first in range(0, len(window), batch_size):
            yield window[first : first + batch_size]


def collate(examples: Sequence[Example], pad_id: int, device: torch.device, width: int = 0) -> Batch:
    """The rows as tensors, as wide as the longest if nothing is said."""
    width = width or max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), width), pad_id)
    predicts = torch.zeros((len(examples), width - 1), dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        predicts[row, example.answer_start - 1 : length - 1] = True
    return Batch(input_ids.to(device), predicts.to(device))


def pack(examples: Sequence[Example], device: torch.device) -> Batch:
    """The rows one behind the other, without padding."""
    input_ids = torch.tensor([[token for example in examples for token in example.input_ids]])
    positions = torch.tensor([[place for example in examples for place in range(len(example.input_ids))]])
    predicts = torch.tensor(
        [[place >= example.answer_start for example in examples for place in range(len(example.input_ids))]]
    )
    return Batch(input_ids.to(device), predicts[:, 1:].to(device), positions.to(device))


def answer_tokens(examples: Sequence[Example]) -> int:
    """How many tokens of these rows have a loss."""
    return sum(len(example.input_ids) - example.answer_start for example in examples)
