"""How good a model is on held-out rows."""

from collections.abc import Sequence

import torch

from mpctf_secure.training.batching import Batch, batches, collate
from mpctf_secure.training.data import Example
from mpctf_secure.training.model import answer_logits, device_of


@torch.inference_mode()
def exact_match(model: torch.nn.Module, examples: Sequence[Example], batch_size: int, pad_id: int) -> float:
    """The share of rows that greedy decoding would answer exactly, end-of-turn token included.

    One teacher-forced forward is enough: greedy decoding gives the gold answer if and only if, after every correct
    beginning of it, the most likely token is the next gold one.
    """
    model.eval()
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    right = sum(_count_right(model, collate(rows, pad_id, device_of(model))) for rows in batches(ordered, batch_size))
    return right / len(examples)


def _count_right(model: torch.nn.Module, batch: Batch) -> int:
    wrong = torch.zeros_like(batch.predicts)
    wrong[batch.predicts] = answer_logits(model, batch).argmax(-1) != batch.targets
    return int((~wrong.any(1)).sum())
