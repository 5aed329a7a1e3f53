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
    mu: float = 0.0,
    progress: Progress | None = None,
) -> TrainResult:
    """Train what requires a gradient with a fresh AdamW; every epoch in the order that `batches` gives.

    `mu` adds FedProx's μ/2·‖w − start‖² to what is minimised, not to the loss that is reported.
    """
    started = time.monotonic()
    optimizer = _optimizer(model, learning_rate)
    model.train()
    start = [parameter.detach().clone() for parameter in _trained(model)] if mu else []
    steps = [batch for _ in range(epochs) for batch in batches(examples, batch_size, pad_id, device_of(model))]
    weighted = 0.0
    for number, batch in enumerate(steps, 1):
        loss = _step(model, batch, optimizer, mu, start)
        weighted += loss * len(batch.input_ids)
        if progress is not None:
            progress(number, len(steps), loss)
    rows = epochs * len(examples)
    tokens = epochs * sum(len(example.input_ids) for example in examples)
    return TrainResult(weighted / rows, rows, tokens, time.monotonic() - started)


def _optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(_trained(model), lr=learning_rate, weight_decay=0.0, fused=True)


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _step(
    model: torch.nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, mu: float, start: list[torch.Tensor]
) -> float:
    optimizer.zero_grad()
    loss = answer_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    if mu:  # the gradient of the proximal term (Li et al. 2020)
        for parameter, origin in zip(_trained(model), start, strict=True):
            parameter.grad.add_(parameter.detach() - origin, alpha=mu)  # type: ignore[union-attr]
    optimizer.step()
    return loss.item()


def answer_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy in nats over the batch's answer tokens."""
    return cross_entropy(answer_logits(model, batch).float(), batch.targets)
