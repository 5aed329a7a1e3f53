"""The training job: loads the base model once, then trains whenever the agent asks, through all rounds.

Torchrun starts it where it has several processes. The first of the first node is the head: it talks to the agent, reads
the rows, and shares everything with the others, which need the base model only.

Usage: python [torchrun …] -m mpctf_secure.training.worker NODE GPUS [AGENT], with GPUS 0,1,… or -, AGENT on the first
node: the path of a socket, or of a ticket
"""

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpctf_secure import files
from mpctf_secure.aggregation.lora import Vector
from mpctf_secure.config.privacy import RecordDpSgd
from mpctf_secure.errors import EnvironmentUnfitError, UsageError
from mpctf_secure.partition.held_out import divide
from mpctf_secure.privacy.records import Samples
from mpctf_secure.rounds.messages import FaultCode
from mpctf_secure.training import faults
from mpctf_secure.training.channel import Header, JobChannel
from mpctf_secure.training.children import die_with_parent
from mpctf_secure.training.data import Example, tokenise
from mpctf_secure.training.device import hardware, memory_of, own_gpus, take_gpu
from mpctf_secure.training.dpsgd import DpSgd
from mpctf_secure.training.faults import FailedError, as_fault
from mpctf_secure.training.group import Group, is_loss_of_a_neighbour, local_rank, own_rank
from mpctf_secure.training.launch.endpoint import dial
from mpctf_secure.training.loop import Recipe, TrainResult, train_steps
from mpctf_secure.training.memory import explaining_memory
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
from mpctf_secure.training.record_gradients import ROWS, RecordGradients
from mpctf_secure.training.rows import Row, load_rows
from mpctf_secure.training.spec import JobSpec
from mpctf_secure.training.validation import Search, held_out_loss
from mpctf_secure.training.watch import Watch
from mpctf_secure.training.work import Work, decode_examples, encode_examples


class Worker:
    """One process's model; at the head the rows too."""

    def __init__(self, spec: JobSpec, group: Group) -> None:
        self._spec, self._group = spec, group
        self._memory = memory_of(group)  # before the model takes some
        with as_fault(FaultCode.BAD_MODEL):
            if local_rank() == 0:
                _check_model(spec)
            tokenizer = load_tokenizer(spec.model)
            with explaining_memory(spec):
                self.model = load_adapter_model(spec.model, spec.lora, spec.compute)
                if spec.compute.packing:
                    check_keeps_rows_apart(self.model)
        self._base = "4-bit" if spec.compute.four_bit else str(base_dtype(spec.compute.precision))
        self._recipe = _recipe(spec, pad_id(tokenizer))
        self._examples, self._held_out, self._truncated = list[Example](), list[Example](), 0
        if group.is_head:
            with as_fault(FaultCode.BAD_DATA):
                _check_data(spec)
                rows, held_out = _divide(spec, load_rows(spec.data))
                self._examples, self._truncated = tokenise(rows, tokenizer, spec.training.max_length)
                self._held_out, truncated = tokenise(held_out, tokenizer, spec.training.max_length)
                self._truncated += truncated
        self._dpsgd = self._private(spec.record_dpsgd, pad_id(tokenizer)) if spec.record_dpsgd else None
        if spec.training.validation:
            self._held_out = decode_examples(group.share(encode_examples(self._held_out)))

    def describe(self) -> dict[str, Any]:
        """What the agent tells the coordinator (schema) or keeps at the site (the rest)."""
        return {
            "schema": adapter_schema(self.model),
            "rows": len(self._examples),
            "held_out": len(self._held_out),
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
            header: Header = {"rows": len(work.records), "loss": result.loss}
            header |= {"tokens": result.tokens, "seconds": result.seconds}
            if search:
                best = search.best
                header["held_out"] = {"loss_before": search.before, "loss_after": best.loss, "sent_step": best.step}
            channel.send(header, search.best.adapter if search else read_adapter(self.model))

    def follow(self) -> None:
        """The others: train with the head until it says that all is over."""
        zeros = read_adapter(self.model)
        while shared := self._group.share(b""):
            self._train(self._group.share_vector(zeros), Work.decode(shared), lambda _: None)

    def _work(self, request: Header) -> Work:
        """Of a round: the rows that the agent has chosen, or samples drawn here."""
        names, rows = request["names"], self._examples
        if self._dpsgd is None:
            return Work(names, [[rows[index] for index in request["rows"]]])
        samples = Samples.decode(request["samples"], bytes.fromhex(request["secret"]))
        return Work(names, [[rows[index] for index in step] for step in samples.draw(len(rows))], samples)

    def _train(self, adapter: Vector, work: Work, say: Callable[[Header], None]) -> tuple[TrainResult, Search | None]:
        """The adapter to send is the search's where rows are held out; otherwise it is the one that the model has."""
        write_adapter(self.model, adapter)
        train_only(self.model, work.names)
        search = self._search(say) if self._held_out else None

        def after_step(step: int, steps: int) -> None:
            say({"step": step, "steps": steps})
            if search:
                search.after_step(step, steps)

        records, rows = work.records, self._dpsgd.gradients.rows if self._dpsgd else self._most_rows
        with explaining_memory(self._spec, records, rows, trains=True):
            if self._dpsgd is None:
                how = (self._recipe, self._group, after_step, lambda: say({}))
                return train_steps(self.model, records, *how), search
            assert work.samples  # noqa: S101
            try:
                return self._dpsgd.train(work.steps, work.samples, self._recipe, after_step, lambda: say({})), None
            except UsageError as error:  # and not that the agent is gone
                raise FailedError(FaultCode.BAD_MODEL, error) from error

    @property
    def _most_rows(self) -> int:
        """That a process has in memory at a time."""
        share = -(-self._spec.training.batch_size // self._group.size)
        return min(self._spec.compute.micro_batch or share, share)

    def _private(self, dpsgd: RecordDpSgd, pad_id: int) -> DpSgd:
        lengths = json.loads(self._group.share(json.dumps([len(one.input_ids) for one in self._examples]).encode()))
        rows = min(self._most_rows, self._spec.compute.micro_batch or ROWS)
        with as_fault(FaultCode.BAD_MODEL), explaining_memory(self._spec, self._examples, rows):
            gradients = RecordGradients(self.model, lengths, self._spec.training.max_length, rows, pad_id, self._group)
        return DpSgd(self.model, self._group, gradients, dpsgd.clip_norm, len(lengths))

    def _search(self, say: Callable[[Header], None]) -> Search:
        return Search(self._spec.training.send, lambda: self._measure(say), lambda: read_adapter(self.model))

    def _measure(self, say: Callable[[Header], None]) -> float:
        """The loss on the held-out rows; between their batches a sign of life, since they may take long."""
        with explaining_memory(self._spec, self._held_out, self._most_rows):
            return held_out_loss(self.model, self._held_out, self._recipe, self._group, lambda: say({}))


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


def _run(node: int, gpus: list[int], agent: Path | None) -> None:
    with as_fault(FaultCode.NO_GPU):
        take_gpu(gpus)
    group = Group.join()
    channel, raw = None, b""
    if group.is_head and agent is not None:
        with as_fault(FaultCode.UNREACHABLE):
            channel = JobChannel(dial(agent))
        raw = json.dumps(channel.receive()[0]["spec"]).encode()
    spec = JobSpec.model_validate_json(group.share(raw))
    watch = Watch(node, own_gpus(gpus), spec.model, gathers=group.is_head)
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
