"""The training job: loads the base model once, then trains whenever the agent asks, through all rounds.

Torchrun starts it where it has several processes. The first of the first node is the head: it talks to the agent, reads
the rows, and shares everything with the others, which need the base model only.

Usage: python [torchrun …] -m mpctf_secure.training.worker NODE GPUS [AGENT], with GPUS 0,1,… or -, AGENT on the first
node: the path of a socket, or of a ticket
"""

import argparse
import contextlib
import json
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpctf_secure import files
from mpctf_secure.aggregation.lora import Vector
from mpctf_secure.errors import EnvironmentUnfitError, MpctfError, UsageError
from mpctf_secure.monitoring.resources import MOST_GPUS, free_memory
from mpctf_secure.partition.held_out import divide
from mpctf_secure.rounds.messages import FaultCode
from mpctf_secure.training import faults
from mpctf_secure.training.channel import Header, JobChannel
from mpctf_secure.training.children import die_with_parent
from mpctf_secure.training.data import Example, tokenise
from mpctf_secure.training.group import Group, is_loss_of_a_neighbour, local_rank, own_rank
from mpctf_secure.training.launch.endpoint import dial
from mpctf_secure.training.launch.job import Samples
from mpctf_secure.training.loop import Recipe, TrainResult, train_steps
from mpctf_secure.training.model import (
    adapter_schema,
    base_dtype,
    check_keeps_rows_apart,
    load_adapter_model,
    load_tokenizer,
    pad_id,
    read_adapter,
    train_only,
    write_adapter,
)
from mpctf_secure.training.model_hash import hash_model
from mpctf_secure.training.private import Noise, draw, train_privately
from mpctf_secure.training.record_gradients import ROWS, RecordGradients
from mpctf_secure.training.rows import Row, load_rows
from mpctf_secure.training.spec import JobSpec
from mpctf_secure.training.validation import Search, held_out_loss
from mpctf_secure.training.watch import Watch

_NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # which have no exception of their own


class FailedError(Exception):
    """A mistake that the site's operator can mend."""

    def __init__(self, code: FaultCode, error: MpctfError) -> None:
        super().__init__(error.message)
        self.code, self.hint = code, error.hint


@contextlib.contextmanager
def _blaming(code: FaultCode) -> Iterator[None]:
    try:
        yield
    except MpctfError as error:
        raise FailedError(code, error) from error


class Worker:
    """One process's model; at the head the rows too."""

    def __init__(self, spec: JobSpec, group: Group) -> None:
        self._spec, self._group = spec, group
        self._memory = _memory(group)  # before the model takes some
        with _blaming(FaultCode.BAD_MODEL):
            if local_rank() == 0:
                _check_model(spec)
            tokenizer = load_tokenizer(spec.model)
            with _explaining_memory(lambda: _too_large(spec)):
                self.model = load_adapter_model(spec.model, spec.lora, spec.compute)
                if spec.compute.packing:
                    check_keeps_rows_apart(self.model)
        self._base = "4-bit" if spec.compute.four_bit else str(base_dtype(spec.compute.precision))
        self._recipe = _recipe(spec, pad_id(tokenizer))
        self._examples, self._held_out, self._truncated = list[Example](), list[Example](), 0
        if group.is_head:
            with _blaming(FaultCode.BAD_DATA):
                _check_data(spec)
                rows, held_out = _divide(spec, load_rows(spec.data))
                self._examples, self._truncated = tokenise(rows, tokenizer, spec.training.max_length)
                self._held_out, truncated = tokenise(held_out, tokenizer, spec.training.max_length)
                self._truncated += truncated
        self._gradients = self._record_gradients(pad_id(tokenizer)) if spec.record_dpsgd else None
        if spec.training.validation:
            self._held_out = _examples(json.loads(group.share(json.dumps(_plain(self._held_out)).encode())))

    def describe(self) -> dict[str, Any]:
        """What the agent tells the coordinator (schema) or keeps at the site (the rest)."""
        return {
            "schema": adapter_schema(self.model),
            "rows": len(self._examples),
            "truncated": self._truncated,
            "hardware": {**hardware(), "base": self._base, "processes": self._group.size},
            "memory": self._memory,
        }

    def serve(self, channel: JobChannel, watch: Watch) -> None:
        """The head: train on request until the agent hangs up, which the others are told."""
        while True:
            try:
                request, adapter = channel.receive()
            except EnvironmentUnfitError:
                self._group.share(b"")
                return
            work = self._work(request)
            self._group.share(work.encode())
            adapter = self._group.share_vector(adapter)

            def say(header: Header) -> None:
                channel.send({**header, "resources": watch.take()})

            result, search = self._train(adapter, work, say)
            header: Header = {"rows": len(work.rows), "loss": result.loss}
            header |= {"tokens": result.tokens, "seconds": result.seconds}
            if search:
                best = search.best
                header["held_out"] = {"loss_before": search.before, "loss_after": best.loss, "sent_step": best.step}
            channel.send(header, search.best.adapter if search else read_adapter(self.model))

    def follow(self) -> None:
        """The others: train with the head until it says that all is over."""
        zeros = read_adapter(self.model)
        while shared := self._group.share(b""):
            self._train(self._group.share_vector(zeros), _Work.decode(shared), lambda _: None)

    def _work(self, request: Header) -> "_Work":
        """Of a round: the rows that the agent has chosen, or samples drawn here."""
        names, dpsgd, all_rows = request["names"], self._spec.record_dpsgd, self._examples
        if dpsgd is None:
            return _Work(names, [all_rows[index] for index in request["rows"]])
        samples = Samples.decode(request["samples"])
        expected = samples.release.sampling_rate * len(all_rows)
        noise = Noise(samples.release.noise_multiplier, dpsgd.clip_norm, expected, samples.secret)
        steps = draw(len(all_rows), samples)
        return _Work(names, [all_rows[index] for step in steps for index in step], noise, list(map(len, steps)))

    def _train(
        self, adapter: Vector, work: "_Work", say: Callable[[Header], None]
    ) -> tuple[TrainResult, Search | None]:
        """The adapter to send is the search's where rows are held out; otherwise it is the one that the model has."""
        write_adapter(self.model, adapter)
        train_only(self.model, work.names)
        search = self._search(say) if self._held_out else None

        def after_step(step: int, steps: int) -> None:
            say({"step": step, "steps": steps})
            if search:
                search.after_step(step, steps)

        smaller = [] if self._spec.compute.gradient_checkpointing else ["gradient_checkpointing: true"]
        rows = self._gradients.rows if self._gradients else self._most_rows
        with _explaining_memory(lambda: _too_much(self._spec, work.rows, rows, smaller)):
            how = (self._recipe, self._group, after_step, lambda: say({}))
            if work.noise is None:
                return train_steps(self.model, work.rows, *how), search
            if self._gradients is None:
                raise RuntimeError("noise on records in a job without record_dpsgd")
            with _blaming(FaultCode.BAD_MODEL):
                return train_privately(self.model, work.steps, work.noise, self._gradients, *how), None

    @property
    def _most_rows(self) -> int:
        """That a process has in memory at a time."""
        share = -(-self._spec.training.batch_size // self._group.size)
        return min(self._spec.compute.micro_batch or share, share)

    def _record_gradients(self, pad_id: int) -> RecordGradients:
        lengths = json.loads(self._group.share(json.dumps([len(one.input_ids) for one in self._examples]).encode()))
        rows = min(self._most_rows, self._spec.compute.micro_batch or ROWS)
        with _blaming(FaultCode.BAD_MODEL), _explaining_memory(lambda: _too_much(self._spec, self._examples, rows, [])):
            return RecordGradients(self.model, lengths, self._spec.training.max_length, rows, pad_id, self._group)

    def _search(self, say: Callable[[Header], None]) -> Search:
        return Search(self._spec.training.send, lambda: self._measure(say), lambda: read_adapter(self.model))

    def _measure(self, say: Callable[[Header], None]) -> float:
        """The loss on the held-out rows; between their batches a sign of life, since they may take long."""
        with _explaining_memory(lambda: _too_much(self._spec, self._held_out, self._most_rows, [])):
            return held_out_loss(self.model, self._held_out, self._recipe, self._group, lambda: say({}))


class _Work(NamedTuple):
    """Of one round: what is trained, on which rows; of DP-SGD the noise, and how many of the rows each step has."""

    names: list[str]
    rows: list[Example]
    noise: Noise | None = None
    sizes: list[int] = []  # noqa: RUF012

    @classmethod
    def decode(cls, shared: bytes) -> "_Work":
        """What the head has encoded."""
        names, rows, noise, sizes = json.loads(shared)
        return cls(names, _examples(rows), noise and Noise(*noise), sizes)

    def encode(self) -> bytes:
        """For the other processes, without the noise's secret."""
        noise = self.noise and (self.noise.multiplier, self.noise.clip_norm, self.noise.expected)
        return json.dumps([self.names, _plain(self.rows), noise, self.sizes]).encode()

    @property
    def steps(self) -> list[list[Example]]:
        """The rows of each step."""
        rows = iter(self.rows)
        return [list(islice(rows, size)) for size in self.sizes]


def _recipe(spec: JobSpec, pad_id: int) -> Recipe:
    return Recipe(
        batch_size=spec.training.batch_size,
        epochs=spec.training.local_epochs,
        learning_rate=spec.training.learning_rate,
        pad_id=pad_id,
        mu=spec.mu,
        micro_batch=spec.compute.micro_batch,
        packing=spec.compute.packing,
    )


def _plain(examples: list[Example]) -> list[tuple[int, tuple[int, ...]]]:
    """For JSON."""
    return [(example.answer_start, example.input_ids) for example in examples]


def _examples(plain: list[tuple[int, list[int]]]) -> list[Example]:
    return [Example(tuple(ids), start) for start, ids in plain]


def _divide(spec: JobSpec, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those held out."""
    parts = divide(spec.training.validation, len(rows), spec.seed, spec.participant)
    if not parts[0]:
        raise UsageError(
            f"{spec.data}: training.validation holds out its only row, none is left to train on",
            hint="add rows, or validation: 0 in the run file",
        )
    trained, held_out = ([rows[index] for index in part] for part in parts)
    return trained, held_out


@contextlib.contextmanager
def _explaining_memory(explain: Callable[[], MpctfError]) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
            sign in str(error) for sign in _NO_MEMORY
        )
        if not full:
            raise
        raise FailedError(FaultCode.OUT_OF_MEMORY, explain()) from error


def _too_large(spec: JobSpec) -> MpctfError:
    return EnvironmentUnfitError(f"{spec.model}: out of memory with the base model alone", hint=_advice(spec, []))


def _too_much(spec: JobSpec, examples: list[Example], rows: int, smaller: list[str]) -> MpctfError:
    longest = max((len(example.input_ids) for example in examples), default=0)
    fewer = [f"micro_batch: {rows // 2}"] if rows > 1 else []
    return EnvironmentUnfitError(
        f"out of memory with {rows} rows of up to {longest} tokens at a time", hint=_advice(spec, [*fewer, *smaller])
    )


def _advice(spec: JobSpec, smaller: list[str]) -> str:
    """What the site file does not say yet."""
    compute, options = spec.compute, list(smaller)
    if torch.cuda.is_available() and not (compute.four_bit or compute.sharded):
        options += ["four_bit: true", "sharded: true, over several GPUs"]
    if compute.precision == "float32":
        options.append("precision: bfloat16")
    said = " or ".join(options)
    return f"compute.{said} in the site file" if said else "more memory, or a smaller training.max_length"


def _check_model(spec: JobSpec) -> None:
    """On every node: another base model there would spoil the sum without an error."""
    if hash_model(spec.model).whole.hex() != spec.model_hash:
        raise EnvironmentUnfitError(f"{spec.model}: another base model than the agent's", hint="copy it to every node")


def _check_data(spec: JobSpec) -> None:
    """Rows are chosen by number: in another file the numbers mean other rows."""
    try:
        same = files.digest(spec.data).hex() == spec.data_hash
    except OSError as error:
        raise UsageError(f"{spec.data}: {error.strerror}", hint="the first node reads the data file") from error
    if not same:
        raise UsageError(f"{spec.data}: changed since this site joined the run", hint="put the old file back")


def _memory(group: Group) -> tuple[str, int]:
    """What a participant's weight counts in, and how many MiB of it are free on all nodes."""
    kind, free = "cpu", free_memory(()) if local_rank() == 0 else 0
    if torch.cuda.is_available():
        kind, free = "gpu", torch.cuda.mem_get_info()[0]
    total = torch.tensor([free >> 20])
    group.add([total])
    return kind, max(1, int(total))


def hardware() -> dict[str, Any]:
    """What the figures of this site were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _take_gpu(named: list[int]) -> None:
    """The one with this process's number among those that it sees; none where no GPU is named or seen."""
    if named:
        free_memory(named)  # which knows what there is
        if not torch.cuda.is_available():
            hint = "install a torch build with CUDA, or say compute.nodes: [{processes: 1}]"
            raise EnvironmentUnfitError(f"torch {torch.__version__} uses none of this node's GPUs", hint=hint)
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank() >= count:
            hint = "fewer slurm.workers, or more GPUs in slurm.options"
            raise EnvironmentUnfitError(f"process {local_rank() + 1} of this node sees {count} GPUs", hint=hint)
        torch.cuda.set_device(local_rank())


def _own_gpus(gpus: list[int]) -> Collection[int]:
    """Those that are named, else all that a job sees which uses any."""
    return gpus or range(MOST_GPUS if torch.cuda.is_available() else 0)


def _run(node: int, gpus: list[int], agent: Path | None) -> None:
    with _blaming(FaultCode.NO_GPU):
        _take_gpu(gpus)
    group = Group.join()
    channel, raw = None, b""
    if group.is_head and agent is not None:
        with _blaming(FaultCode.UNREACHABLE):
            channel = JobChannel(dial(agent))
        raw = json.dumps(channel.receive()[0]["spec"]).encode()
    spec = JobSpec.model_validate_json(group.share(raw))
    watch = Watch(node, _own_gpus(gpus), spec.model, gathers=group.is_head)
    if local_rank() == 0:
        watch.start()
    worker = Worker(spec, group)
    if channel is None:
        worker.follow()
    else:
        channel.send(worker.describe())
        worker.serve(channel, watch)
    group.leave()


def _last_words(error: Exception, node: int) -> faults.Fault:
    code, message, hint = FaultCode.DEFECT, str(error), "please report the traceback in the log, without your data"
    if isinstance(error, FailedError):
        code, hint = error.code, error.hint
    elif is_loss_of_a_neighbour(error):
        code, message, hint = FaultCode.KILLED, "another process of the training job is gone", "see that node's log"
    return faults.Fault(code, node, own_rank(), message, hint)


def main() -> None:
    """Do all that; a failure's last words say what, where and how to mend it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("node", type=int)
    parser.add_argument("gpus", type=lambda text: [] if text == "-" else [int(part) for part in text.split(",")])
    parser.add_argument("agent", type=Path, nargs="?")
    options = parser.parse_args()
    die_with_parent(signal.SIGKILL)  # it may hang
    try:
        _run(options.node, options.gpus, options.agent)
    except EnvironmentUnfitError:  # the agent is gone, or hung up while this trained
        sys.exit(0)
    except Exception as error:
        traceback.print_exc()
        faults.tell(_last_words(error, options.node))
        sys.exit(1)


if __name__ == "__main__":
    main()
