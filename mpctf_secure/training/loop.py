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

Steps = Sequence[Sequence[Example]]
"""The rows of each step, of all processes together."""
Gradient = Callable[[Sequence[Example]], torch.Tensor]
"""Puts the gradient of these rows, of all processes, into the trained parameters; gives the sum of this process's rows'
losses."""


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
    """Train what requires a gradient by the mean loss of a batch; every epoch in the order that `batches` gives.

    With several processes each takes every size-th row of a batch, and all make the same step: that of one process on
    the whole batch, but for the order in which floats are added. `after_step` gets (step from 1, steps).
    """
    model.train()
    steps = [rows for _ in range(recipe.epochs) for rows in batches(examples, recipe.batch_size)]
    gradient = _mean_gradient(model, recipe, group, between_passes)
    return take_steps(model, steps, gradient, recipe, group, after_step)


def take_steps(
    model: torch.nn.Module,
    steps: Steps,
    gradient: Gradient,
    recipe: Recipe,
    group: Group,
    after_step: Callable[[int, int], None],
) -> TrainResult:
    """The same by this gradient of these steps' rows, with a fresh AdamW."""
    started = time.monotonic()
    trained = trained_parameters(model)
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    pull = _proximal(trained, recipe.mu)
    # Stays on the device: to look at a loss is to wait for it.
    total = torch.zeros((), device=device_of(model))
    for number, rows in enumerate(steps, 1):
        optimizer.zero_grad()
        total += gradient(rows)
        pull()
        optimizer.step()
        after_step(number, len(steps))
    group.add([total])
    rows_seen = sum(map(len, steps))
    tokens = sum(len(example.input_ids) for rows in steps for example in rows)
    return TrainResult(total.item() / max(rows_seen, 1), rows_seen, tokens, time.monotonic() - started)


def trained_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Those that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _proximal(trained: Sequence[torch.nn.Parameter], mu: float) -> Callable[[], None]:
    """Adds the gradient of μ/2·‖w − start‖² (Li et al. 2020), which is no part of the loss that is reported."""
    start = [parameter.detach().clone() for parameter in trained] if mu else []

    def pull() -> None:
        for parameter, origin in zip(trained, start, strict=bool(mu)):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=mu)

    return pull


def _mean_gradient(
    model: torch.nn.Module, recipe: Recipe, group: Group, between_passes: Callable[[], None]
) -> Gradient:
    """That of the mean loss over the answer tokens of a batch."""
    trained = trained_parameters(model)

    def of_batch(rows: Sequence[Example]) -> torch.Tensor:
        loss = len(rows) * _backward(model, rows, recipe, group, between_passes)
        group.add([gradient for parameter in trained if (gradient := parameter.grad) is not None])
        return loss

    return of_batch


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
    size = recipe.micro_batch or math.ceil(recipe.batch_size / group.size)
    for start in range(0, most, size):
        part = mine[start : start + size]
        batch = pack(part or rows[:1], device) if recipe.packing else collate(part or rows[:1], recipe.pad_id, device)
        yield batch if part else batch.silent()


def summed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy in nats, added up over the batch's answer tokens."""
    return cross_entropy(answer_logits(model, batch).float(), batch.targets, reduction="sum")
