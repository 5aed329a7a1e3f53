"""A full memory: what was too much for it, and which settings of the site file would need less."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.rounds.messages import FaultCode
from mpctf_secure.training.data import Example
from mpctf_secure.training.faults import FailedError
from mpctf_secure.training.spec import JobSpec

_SIGNS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # of errors without an exception of their own


@contextlib.contextmanager
def explaining_memory(
    spec: JobSpec, examples: Sequence[Example] = (), rows: int = 0, *, trains: bool = False
) -> Iterator[None]:
    """FailedError where there is not enough: of so many rows at a time of these, or of the model alone."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in _SIGNS)
        if not full:
            raise
        message = f"{spec.model}: out of memory with the base model alone"
        if rows:
            longest = max((len(example.input_ids) for example in examples), default=0)
            message = f"out of memory with {rows} rows of up to {longest} tokens at a time"
        explained = EnvironmentUnfitError(message, hint=_advice(spec, rows, trains=trains))
        raise FailedError(FaultCode.OUT_OF_MEMORY, explained) from error


def _advice(spec: JobSpec, rows: int, *, trains: bool) -> str:
    """What the site file does not say yet."""
    compute, options = spec.compute, list[str]()
    if rows > 1:
        options.append(f"micro_batch: {rows // 2}")
    if trains and not compute.gradient_checkpointing:
        options.append("gradient_checkpointing: true")
    if torch.cuda.is_available() and not (compute.four_bit or compute.sharded):
        options += ["four_bit: true", "sharded: true, over several GPUs"]
    if compute.precision == "float32":
        options.append("precision: bfloat16")
    said = " or ".join(options)
    return f"compute.{said} in the site file" if said else "more memory, or a smaller training.max_length"
