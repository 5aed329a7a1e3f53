"""What a process of a training job runs on."""

import platform
from collections.abc import Collection
from typing import Any

import torch

from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.monitoring.resources import MOST_GPUS, free_memory
from mpctf_secure.training.group import Group, local_rank


def take_gpu(named: list[int]) -> None:
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


def own_gpus(named: list[int]) -> Collection[int]:
    """Those that are named, else all that a job sees which uses any."""
    return named or range(MOST_GPUS if torch.cuda.is_available() else 0)


def hardware() -> dict[str, Any]:
    """What the figures of this site were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def memory_of(group: Group) -> tuple[str, int]:
    """What a participant's weight counts in, and how many MiB of it are free on all nodes."""
    kind, free = "cpu", free_memory(()) if local_rank() == 0 else 0
    if torch.cuda.is_available():
        kind, free = "gpu", torch.cuda.mem_get_info()[0]
    total = torch.tensor([free >> 20])
    group.add([total])
    return kind, max(1, int(total))
