"""Which of a round's adapters is sent: the last one, or the one that does best on the rows a site holds out."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mpctf_secure.aggregation.lora import Vector
from mpctf_secure.config.training import Send
from mpctf_secure.training.batching import answer_tokens, batches
from mpctf_secure.training.data import Example
from mpctf_secure.training.group import Group
from mpctf_secure.training.loop import Recipe, shares, summed_loss
from mpctf_secure.training.model import device_of

_POINTS = 4


class Measured(NamedTuple):
    """The adapter [d] after `step`, and its mean loss over the held-out rows in nats per answer token."""

    step: int
    loss: float
    adapter: Vector


def points(steps: int, send: Send) -> set[int]:
    """The steps, from 1, after which is measured: the last; for `best` ⌈k·steps/4⌉ for k = 1 … 4, so that one too."""
    return {-(-k * steps // _POINTS) for k in range(1, _POINTS + 1)} if send == "best" else {steps}


class Search:
    """Keeps in `best` the adapter to send, in `before` the held-out loss of the one that the round began with.

    `measure` gives the loss of the present one, `read` a copy of it.
    """

    def __init__(self, send: Send, measure: Callable[[], float], read: Callable[[], Vector]) -> None:
        self._send, self._measure, self._read = send, measure, read
        self.before = measure()
        self.best = Measured(0, math.nan, np.empty(0, np.float32))

    def after_step(self, step: int, steps: int) -> None:
        """Measure where it is due; of equally good adapters the earlier is kept, any number being better than NaN."""
        if step not in points(steps, self._send):
            return
        loss = self._measure()
        if loss < self.best.loss or math.isnan(self.best.loss):
            self.best = Measured(step, loss, self._read())


@torch.no_grad()  # and not inference_mode: what FSDP2 gathers there could not be trained with
def held_out_loss(
    model: torch.nn.Module, examples: Sequence[Example], recipe: Recipe, group: Group, after_batch: Callable[[], None]
) -> float:
    """Mean cross-entropy in nats over all answer tokens of the rows, which all processes share as in training.

    They add up batch by batch, so that none runs ahead and `after_batch` tells of all. Training goes on unchanged.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device_of(model))
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    for rows in batches(ordered, recipe.batch_size):
        part = torch.zeros_like(total)
        for batch in shares(rows, recipe, group, part.device):
            part += summed_loss(model, batch)
        group.add([part])
        total += part
        after_batch()
    model.train()
    return total.item() / answer_tokens(examples)
