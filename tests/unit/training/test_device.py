import pytest
import torch

from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.training import device


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch without GPUs")
def test_gpus_that_torch_cannot_use_are_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training would run on the processor, at a hundredth of the speed, and say nothing."""
    monkeypatch.setattr(device, "free_memory", lambda _: 0)
    with pytest.raises(EnvironmentUnfitError, match="uses none of this node's GPUs"):
        device.take_gpu([0])


def test_process_without_a_gpu_of_its_own_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(EnvironmentUnfitError, match="process 3 of this node sees 2 GPUs"):
        device.take_gpu([])
