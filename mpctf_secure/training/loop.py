"""Local training between two exchanges."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from mpctf_secure.training.batching import Batch, batches
from mpctf_secure.training.data import Example
from mpctf_secure.training.model import answer_logits, device_of

Progress = Callable[[int, int, float], None]
"""Called after every step with (step from 1, steps, the batch's loss)."""


@dataclass(frozen=True)
class TrainResult:
    """`loss`: mean over rows of their batch's loss in nats per answer token; `tokens`: all input tokens, unpadded."""

    loss: float
    rows: int
    tokens: int
    seconds: float


def train_steps(
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    pad_id: int,
    progress: Progress | None = None,
) -> TrainResult:
    """Train what requires a gradient with a fresh AdamW; every epoch in the order that `batches` gives."""
    started = time.monotonic()
    optimizer = _optimizer(model, learning_rate)
    model.train()
    steps = [batch for _ in range(epochs) for batch in batches(examples, batch_size, pad_id, device_of(model))]
    weighted = 0.0
    for number, batch in enumerate(steps, 1):
        loss = _step(model, batch, optimizer)
        weighted += loss * len(batch.input_ids)
        if progress is not None:
            progress(number, len(steps), loss)
    rows = epochs * len(examples)
    tokens = epochs * sum(len(example.input_ids) for example in examples)
    return TrainResult(weighted / rows, rows, tokens, time.monotonic() - started)


def _optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)


def _step(model: torch.nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = answer_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def answer_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy in nats over the batch's answer tokens."""
    return cross_entropy(answer_logits(model, batch).float(), batch.targets)
