"""The training job: started by torchrun, loads the base model once, trains whenever the agent asks, through all rounds.

Usage: torchrun … -m mpctf_secure.training.worker SOCKET
"""

import platform
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from mpctf_secure.config.run import Lora, Training
from mpctf_secure.errors import EnvironmentUnfitError, MpctfError, UsageError
from mpctf_secure.training.channel import JobChannel
from mpctf_secure.training.children import die_with_parent
from mpctf_secure.training.data import ChatTokenizer, tokenise
from mpctf_secure.training.launch import JobSpec
from mpctf_secure.training.loop import train_steps
from mpctf_secure.training.model import (
    adapter_schema,
    add_lora,
    base_dtype,
    load_base,
    read_adapter,
    train_only,
    write_adapter,
)
from mpctf_secure.training.rows import load_rows


class Worker:
    """Model and data of one participant."""

    def __init__(self, spec: JobSpec) -> None:
        self._training = Training.model_validate(spec.training)
        self._memory = free_memory()  # before the model takes some
        tokenizer = load_tokenizer(Path(spec.model))
        rows = load_rows(Path(spec.data))
        self.examples, self.truncated = tokenise(rows, tokenizer, self._training.max_length)
        self.model = load_adapter_model(Path(spec.model), Lora.model_validate(spec.lora))
        self._pad_id = pad_id(tokenizer)
        self._mu = spec.mu

    def describe(self) -> dict[str, Any]:
        """What the agent tells the coordinator (schema) or keeps at the site (the rest)."""
        return {
            "schema": adapter_schema(self.model),
            "rows": len(self.examples),
            "truncated": self.truncated,
            "hardware": hardware(),
            "memory": self._memory,
        }

    def serve(self, channel: JobChannel) -> None:
        """Train on request until the agent hangs up."""
        while True:
            request, adapter = channel.receive()
            write_adapter(self.model, adapter)
            train_only(self.model, request["names"])
            result = train_steps(
                self.model,
                [self.examples[index] for index in request["rows"]],
                batch_size=self._training.batch_size,
                epochs=self._training.local_epochs,
                learning_rate=self._training.learning_rate,
                pad_id=self._pad_id,
                mu=self._mu,
                progress=lambda step, steps, _: channel.send({"step": step, "steps": steps}),
            )
            figures = {"loss": result.loss, "tokens": result.tokens, "seconds": result.seconds}
            channel.send({"rows": len(request["rows"]), **figures}, read_adapter(self.model))


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer in a local transformers folder; EnvironmentUnfitError where there is none."""
    try:
        tokenizer: ChatTokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise EnvironmentUnfitError(f"{folder}: {reason}", hint="the folder needs the model's tokenizer") from error
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """Any token will do: padding lies behind every answer and is never predicted."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def load_adapter_model(folder: Path, lora: Lora) -> PeftModel:
    """Base model with a LoRA adapter, on the GPU where there is one."""
    model = add_lora(load_base(folder, base_dtype()), lora)
    return model.to("cuda") if torch.cuda.is_available() else model


def hardware() -> dict[str, Any]:
    """What the figures of this site were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def free_memory() -> tuple[str, int]:
    """What a participant's weight counts in, and how many MiB of it are free."""
    if torch.cuda.is_available():
        return "gpu", max(1, torch.cuda.mem_get_info()[0] >> 20)
    return "cpu", psutil.virtual_memory().available >> 20


def main(path: str) -> None:
    """Connect to the agent, load what it names, serve; tell it of any mistake that a user can mend."""
    die_with_parent()
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    channel = JobChannel(connection)
    spec, _ = channel.receive()
    try:
        worker = Worker(JobSpec(**spec["spec"]))
    except MpctfError as error:
        channel.send({"error": error.message, "hint": error.hint, "usage": isinstance(error, UsageError)})
        return
    channel.send(worker.describe())
    try:
        worker.serve(channel)
    except EnvironmentUnfitError:  # the agent hung up: the run is over, or the agent is gone
        return
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
