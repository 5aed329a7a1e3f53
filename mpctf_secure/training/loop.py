"""Local training between two exchanges, on one process or several."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from mpctf_secure.training.batching import Batch, answer_tokens, batches, collate, pack
from mpctf_secure.training.data import Example
from mpctf_secure.training.group import ALONE, Group
from mpctf_secure.training.model import answer_logits, attention, device_of


@dataclass(frozen=True)
class Recipe:
    """How a participant trains in a round: `batch_size` rows a step over all processes, each at most `micro_batch` at a
    time; `mu` of FedProx."""

    batch_size: int
    epochs: int
    learning_rate: float
    pad_id: int
    mu: float = 0.0
    micro_batch: int | None = None
    packing: bool = False


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
    recipe: Recipe,
    group: Group = ALONE,
    after_step: Callable[[int, int], None] = lambda *_: None,
    between_passes: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Train what requires a gradient with a fresh AdamW; every epoch in the order that `batches` gives.

    With several processes each takes every size-th row of a batch, and all make the same step: that of one process on
    the whole batch, but for the order in which floats are added. `after_step` gets (step from 1, steps).
    """
    started = time.monotonic()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    pull = _proximal(trained, recipe.mu)
    model.train()
    steps = [rows for _ in range(recipe.epochs) for rows in batches(examples, recipe.batch_size)]
    # Stays on the device: to look at a loss is to wait for it.
    weighted = torch.zeros((), device=device_of(model))
    for number, rows in enumerate(steps, 1):
        optimizer.zero_grad()
        weighted += len(rows) * _backward(model, rows, recipe, group, between_passes)
        group.add([gradient for p in trained if (gradient := p.grad) is not None])
        pull()
        optimizer.step()
        after_step(number, len(steps))
    group.add([weighted])
    rows_seen = recipe.epochs * len(examples)
    tokens = recipe.epochs * sum(len(example.input_ids) for example in examples)
    return TrainResult(weighted.item() / rows_seen, rows_seen, tokens, time.monotonic() - started)


def _proximal(trained: Sequence[torch.nn.Parameter], mu: float) -> Callable[[], None]:
    """Adds the gradient of μ/2·‖w − start‖² (Li et al. 2020), which is no part of the loss that is reported."""
    start = [parameter.detach().clone() for parameter in trained] if mu else []

    def pull() -> None:
        for parameter, origin in zip(trained, start, strict=bool(mu)):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=mu)

    return pull


def _backward(
    model: torch.nn.Module, rows: Sequence[Example], recipe: Recipe, group: Group, between_passes: Callable[[], None]
) -> torch.Tensor:
    """This process's part of the batch's loss, whose gradients are added up in the parameters."""
    device, answers = device_of(model), answer_tokens(rows)
    total = torch.zeros((), device=device)
    for number, batch in enumerate(shares(rows, recipe, group, device)):
        if number:
            between_passes()
        with attention(model, batch):  # also of what gradient checkpointing computes again
            loss = summed_loss(model, batch) / answers
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def shares(rows: Sequence[Example], recipe: Recipe, group: Group, device: torch.device) -> Iterator[Batch]:
    """What this process computes of a batch: as many passes as all the others, since a sharded model needs all."""
    mine, most = rows[group.rank :: group.size], math.ceil(len(rows) / group.size)
    size = min(recipe.micro_batch or most, most)
    for start in range(0, most, size):
        part = mine[start : start + size]
        batch = pack(part or rows[:1], device) if recipe.packing else collate(part or rows[:1], recipe.pad_id, device)
        yield batch if part else batch.silent()


def summed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy in nats, added up over the batch's answer tokens."""
    return cross_entropy(answer_logits(model, batch).float(), batch.targets, reduction="sum")
