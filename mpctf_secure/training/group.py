"""The processes of a training job: one for each GPU, on one node or several."""

import datetime
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from mpctf_secure.aggregation.lora import Vector

# Between rounds they wait for the agent, however long; a hang is noticed by the agent, which ends the job.
_WITHOUT_END = datetime.timedelta(days=365)


class Group:
    """This process among `size`; rank 0 is the head. Nothing is pickled: only tensors travel."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(cls) -> "Group":
        """Meet the others that torchrun started; without torchrun there are none."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_WITHOUT_END)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_head(self) -> bool:
        """Whether this process talks to the agent: the first of the first node."""
        return self.rank == 0

    def share(self, content: bytes) -> bytes:
        """The head's bytes; what the others give does not matter."""
        if self.size == 1:
            return content
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0)
        body = torch.empty(int(length), dtype=torch.uint8)
        if self.is_head and content:
            body.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(body, 0)
        return body.numpy().tobytes()

    def share_vector(self, vector: Vector) -> Vector:
        """The head's float32 vector; the others give one of the same length."""
        if self.size == 1:
            return vector
        shared = torch.from_numpy(vector.copy())
        self.share_tensor(shared)
        result: Vector = shared.numpy()
        return result

    def share_tensor(self, tensor: torch.Tensor) -> None:
        """Replace the others' by the head's, of the same shape."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def agrees(self, own: bool) -> bool:
        """Whether all processes say yes."""
        yes = torch.tensor([int(own)])
        self.add([yes])
        return int(yes) == self.size

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes: as one vector, since an adapter is many small tensors.

        After the backward pass and not, as in DDP, during it: an adapter's gradients are a thousandth of a model's,
        which factors have any changes from round to round, and the base may be sharded.
        """
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

    def leave(self) -> None:
        """Say goodbye to the others."""
        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = Group()
"""One process."""


def is_loss_of_a_neighbour(error: Exception) -> bool:
    """Whether a collective failed, as it does where another process has died; gloo has no exception of its own."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def own_rank() -> int:
    """This process's number over all nodes, as far as torchrun has given one."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its node, as torchrun gives it."""
    return int(os.environ.get("LOCAL_RANK", "0"))
