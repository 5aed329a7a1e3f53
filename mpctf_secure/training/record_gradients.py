"""The gradient of each record, in which no other record shows.

A record's loss is the mean over its own answer tokens. Padding and neighbours change how floats are rounded, and so
does another kind of machine: so a pass has a fixed number of rows and a width that follows from its records' own
lengths, a record always goes to the same process, and it is tried at the start whether its gradient is the same to the
last bit in the first and the last row and beside other records. Where it is not, each record goes alone.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from mpctf_secure.errors import UsageError
from mpctf_secure.hazmat.kdf import sha256
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

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleHooks

ROWS = 8
"""Of a pass, if nothing else is said."""
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
        self, model: PeftModel, lengths: Collection[int], max_length: int, rows: int, pad_id: int, group: Group
    ) -> None:
        """For records of these lengths; so many rows in a pass where that can be.

        UsageError for a model in which one record shows in all that follow.
        """
        _check_forgets(model, max_length)
        self._model, self._max_length, self._pad_id, self._group = model, max_length, pad_id, group
        self._rows = rows
        self.together = set[int]()
        """Widths at which a pass has several records."""
        if self._rows > 1 and not _never_apart(model):
            widths = sorted(set(map(self._width, lengths)))
            with _another_adapter(model):
                self.together = {width for width in widths if group.agrees(self._holds_apart(width))}

    @property
    def rows(self) -> int:
        """Of a pass, at the most."""
        return self._rows if self.together else 1

    def of(self, records: Sequence[Example]) -> Iterator[tuple[torch.Tensor, Gradients]]:
        """This process's part, pass by pass: the sum of losses, and the gradients."""
        _without_dropout(self._model)
        shares = [list[Example]() for _ in range(self._group.size)]
        for record in records:
            shares[_process_of(record, len(shares))].append(record)
        plans = [list(self._plan(share)) for share in shares]
        with _hooks(self._model) if self.together else nullcontext() as hooks:
            # As many passes as all the others, since a sharded model needs all.
            for passes in zip_longest(*plans):
                mine = passes[self._group.rank]
                yield self._run(mine or next(one for one in passes if one)._replace(records=()), hooks)

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

    def _run(self, one: _Pass, hooks: "GradSampleHooks | None" = None) -> tuple[torch.Tensor, Gradients]:
        if hooks:
            (hooks.enable_hooks if one.rows > 1 else hooks.disable_hooks)()
            hooks.set_grad_sample_to_none()
        nothing = Example((self._pad_id,), 1)
        rows = [*one.records, *[nothing] * (one.rows - len(one.records))]
        return _backward(self._model, collate(rows, self._pad_id, device_of(self._model), one.width))

    def _holds_apart(self, width: int) -> bool:
        """Whether several records can share a pass of this width: not where a kernel adds in any order, or a layer is
        no plain linear one."""
        one, *others = (
            Example(tuple((7 * number + place * place) % 50 for place in range(width - number % 4)), 1 + number % 3)
            for number in range(2 * self._rows - 1)
        )
        try:
            _, alone = self._run(_Pass([one], 1, len(one.input_ids)))
            with _hooks(self._model) as hooks:
                _, first = self._run(_Pass([one, *others[self._rows - 1 :]], self._rows, width), hooks)
                _, last = self._run(_Pass([*others[: self._rows - 1], one], self._rows, width), hooks)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever Opacus cannot do with this model
            return False
        return all(
            torch.equal(here[0], there[-1])
            and bool(there.any())
            and bool((here[0] - by_itself[0]).norm() <= _ALIKE * by_itself[0].norm())
            for here, there, by_itself in zip(first, last, alone, strict=True)
        )


def _process_of(record: Example, processes: int) -> int:
    """Which of them computes a record, whatever the others are: nodes may round differently."""
    return int.from_bytes(sha256(np.array(record.input_ids, "<i8").tobytes())[:8]) % processes


def _check_forgets(model: PeftModel, max_length: int) -> None:
    """Dynamic RoPE keeps the scale of the longest row that it has seen."""
    for module in model.modules():
        longest = getattr(module, "original_max_seq_len", 0)
        if "dynamic" in str(getattr(module, "rope_type", "")) and max_length > longest:
            raise UsageError(
                "record_dpsgd: this model's dynamic RoPE keeps a long record in mind, where no noise covers it",
                hint=f"training.max_length {longest} or less",
            )


def _never_apart(model: PeftModel) -> bool:
    """Whether records go alone without a trial: hooks see nothing of activations that are computed again, and how many
    tokens an expert gets depends on all rows."""
    again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return again or any("expert" in name for name in model.get_base_model().config.to_dict())


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

    In training remain the layers that hooks look at, and those that compute their activations again, without their own.
    """
    model.eval()
    for module in model.modules():
        again = bool(getattr(module, "gradient_checkpointing", False))
        module.training = again or any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        for name in [name for name, value in vars(module).items() if again and "drop" in name and value]:
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)


def _backward(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, Gradients]:
    """The sum of the records' losses, and the gradient of each."""
    trained, records = trained_parameters(model), len(batch.input_ids)
    model.zero_grad()
    with warnings.catch_warnings(), attention(model, batch):
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # in the first layer
        each = cross_entropy(answer_logits(model, batch).float(), batch.targets, reduction="none")
        own = batch.predicts / batch.predicts.sum(1, keepdim=True).clamp(min=1)
        loss = (each * own[batch.predicts]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [_left_in(parameter, records) for parameter in trained]
    model.zero_grad()
    return loss.detach(), gradients


@contextmanager
def _hooks(model: torch.nn.Module) -> "Iterator[GradSampleHooks]":
    """Inside, a backward pass leaves `grad_sample` (records, *shape) in the trained parameters.

    To attach them takes as long as a small pass on a GPU: once for all passes of a step.
    """
    from opacus.grad_sample import GradSampleHooks  # noqa: PLC0415  # a second, which most jobs need not wait for

    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        yield hooks
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
