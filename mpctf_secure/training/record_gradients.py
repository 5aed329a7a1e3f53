"""The gradient of each record, in which no other record shows.

A record's loss is the mean over its own answer tokens. Padding and neighbours change how floats are rounded, and with
experts much more: so a pass has a fixed number of rows and a width that follows from its records' own lengths, and it
is tried at the start whether a record's gradient then is the same to the last bit in any row and beside any others.
Where it is not, each record goes alone.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from mpctf_secure.hazmat.prg import Generator
from mpctf_secure.training.batching import Batch, collate
from mpctf_secure.training.data import Example
from mpctf_secure.training.group import Group
from mpctf_secure.training.loop import trained_parameters
from mpctf_secure.training.model import (
    adapter_schema,
    answer_logits,
    attention,
    device_of,
    read_adapter,
    train_only,
    write_adapter,
)

ROWS = 8
"""Of a pass, if the site file says nothing."""
_WIDTH = 64  # and its multiples
_ALIKE = 0.1  # of a gradient, computed in another shape: bfloat16 has eight bits

Gradients = Sequence[torch.Tensor]
"""Of each trained parameter (records, *shape)."""


class _Pass(NamedTuple):
    """Some records, so many rows, of which those that are too many teach nothing, and how many tokens each has."""

    records: Sequence[Example]
    rows: int
    width: int


class RecordGradients:
    """Of a model in one process of a job."""

    def __init__(
        self, model: PeftModel, lengths: Collection[int], max_length: int, rows: int | None, pad_id: int, group: Group
    ) -> None:
        """For records of these lengths; `rows` of a pass where the site file names them."""
        self._model, self._max_length, self._pad_id, self._group = model, max_length, pad_id, group
        self._rows = rows or ROWS
        self.together = set[int]()
        """Widths at which a pass has several records."""
        if self._rows > 1:
            widths = sorted(set(map(self._width, lengths)))
            with _another_adapter(model):
                self.together = {width for width in widths if group.agrees(self._holds_apart(width))}

    def of(self, records: Sequence[Example]) -> Iterator[tuple[torch.Tensor, Gradients]]:
        """This process's part, pass by pass: the sum of losses, and the gradients."""
        _without_dropout(self._model)
        plan = list(self._plan(records))
        for start in range(0, len(plan), self._group.size):
            number = start + self._group.rank
            # As many passes as all the others: a sharded model needs all.
            yield self._run(plan[number] if number < len(plan) else plan[start]._replace(records=()))

    def _plan(self, records: Sequence[Example]) -> Iterator[_Pass]:
        by_width = dict[int, list[Example]]()
        for record in records:
            by_width.setdefault(self._width(len(record.input_ids)), []).append(record)
        for width, same in sorted(by_width.items()):
            rows = self._rows if width in self.together else 1
            for first in range(0, len(same), rows):
                part = same[first : first + rows]
                yield _Pass(part, rows, width if rows > 1 else len(part[0].input_ids))

    def _width(self, length: int) -> int:
        return min(-(-length // _WIDTH) * _WIDTH, self._max_length)

    def _run(self, one: _Pass) -> tuple[torch.Tensor, Gradients]:
        nothing = Example((self._pad_id,), 1)
        rows = [*one.records, *[nothing] * (one.rows - len(one.records))]
        return _backward(self._model, collate(rows, self._pad_id, device_of(self._model), one.width))

    def _holds_apart(self, width: int) -> bool:
        """Whether several records can share a pass of this width.

        They cannot where experts share out tokens, a kernel adds in any order, activations are computed again, or a
        layer is no plain linear one.
        """
        lengths = [width - 1, width, width // 2 + 1, width - 3]
        one, *others = (
            Example(tuple((7 * number + place * place) % 50 for place in range(length)), 1 + number % 3)
            for number, length in enumerate(lengths)
        )
        mates = others[: self._rows - 1]
        try:
            _, alone = self._run(_Pass([one], 1, len(one.input_ids)))
            _, first = self._run(_Pass([one, others[-1]], self._rows, width))
            _, last = self._run(_Pass([*mates, one], self._rows, width))
        except Exception:  # whatever Opacus cannot do with this model
            return False
        return all(
            torch.equal(here[0], there[len(mates)])
            and bool(there.any())
            and bool((here[0] - by_itself[0]).norm() <= _ALIKE * by_itself[0].norm())
            for here, there, by_itself in zip(first, last, alone, strict=True)
        )


@contextmanager
def _another_adapter(model: PeftModel) -> Iterator[None]:
    """With no factor of zeros, and all trained: else wrong gradients of A could not be seen."""
    held = read_adapter(model)
    words = Generator.of(0, "trial").uint32(held.size)
    write_adapter(model, ((words / 2**31 - 1) / 16).astype(np.float32))
    train_only(model, [name for name, _ in adapter_schema(model)])
    _without_dropout(model)
    try:
        yield
    finally:
        model.zero_grad()
        write_adapter(model, held)


def _without_dropout(model: torch.nn.Module) -> None:
    """Its mask would depend on how many records there are.

    In training remain the layers that hooks look at, and those that compute their activations again.
    """
    model.eval()
    for module in model.modules():
        trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        module.training = trains or bool(getattr(module, "gradient_checkpointing", False))


def _backward(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, Gradients]:
    """The sum of the records' losses, and the gradient of each."""
    trained, records = trained_parameters(model), len(batch.input_ids)
    model.zero_grad()
    with _hooks(model, hooked=records > 1), attention(model, batch):
        each = cross_entropy(answer_logits(model, batch).float(), batch.targets, reduction="none")
        own = batch.predicts / batch.predicts.sum(1, keepdim=True).clamp(min=1)
        loss = (each * own[batch.predicts]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [_left_in(parameter, records) for parameter in trained]
    model.zero_grad()
    return loss.detach(), gradients


@contextmanager
def _hooks(model: torch.nn.Module, *, hooked: bool) -> Iterator[None]:
    """Inside, a backward pass leaves `grad_sample` (records, *shape) in the trained parameters, if `hooked`."""
    if not hooked:
        yield
        return
    from opacus.grad_sample import GradSampleHooks  # noqa: PLC0415  # a second, which most jobs need not wait for

    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        yield
    finally:
        hooks.cleanup()


def _left_in(parameter: torch.nn.Parameter, records: int) -> torch.Tensor:
    """What a backward pass has left in a parameter; zeros where it had no part."""
    found = getattr(parameter, "grad_sample", None) if records > 1 else parameter.grad
    if found is None:
        return torch.zeros((records, *parameter.shape), device=parameter.device)
    if records == 1:
        return found[None]
    if len(found) != records:
        raise RuntimeError("hooks do not give each record's gradient")
    return found
