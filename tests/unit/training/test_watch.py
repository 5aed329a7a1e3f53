import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from mpctf_secure.monitoring.resources import Gpu, Resources
from mpctf_secure.training import watch
from mpctf_secure.training.watch import Watch

GPUS = tuple(Gpu(index, "", None, None, None, None) for index in range(3))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """Of a job on two nodes."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(watch, "_pauses", lambda: [0.0])
    return server


def test_head_has_the_samples_of_all_nodes_each_once(store: dist.TCPStore, tmp_path: Path) -> None:
    head = Watch(1, (), tmp_path, gathers=True)
    other = Watch(2, (), tmp_path, gathers=False)
    other._run()
    head._run()
    samples = {node: Resources.from_json(text.encode()) for node, text in head.take().items()}
    assert samples.keys() == {1, 2}
    assert all(sample.memory_used > 0 for sample in samples.values())
    assert head.take() == other.take() == {}
    head._run()  # and nothing new of node 2
    assert head.take().keys() == {1}


def test_one_process_without_torchrun_has_its_own_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_pauses", lambda: [0.0])
    alone = Watch(1, (), tmp_path, gathers=True)
    alone._run()
    assert alone.take().keys() == {1}


def test_only_the_gpus_of_the_job_are_told(
    store: dist.TCPStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = watch.Sampler.sample
    monkeypatch.setattr(watch.Sampler, "sample", lambda sampler: replace(original(sampler), gpus=GPUS))
    for named in ((), (0, 2), range(64)):
        head = Watch(1, named, tmp_path, gathers=True)
        head._run()
        sample = Resources.from_json(head.take()[1].encode())
        assert [gpu.index for gpu in sample.gpus] == [index for index in range(3) if index in named]


def test_driver_that_hangs_holds_nobody_up(
    store: dist.TCPStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = threading.Event(), threading.Event()

    def hang(_: Path) -> None:
        asked.set()
        answered.wait()
        raise RuntimeError

    monkeypatch.setattr(watch, "Sampler", hang)
    head = Watch(1, (), tmp_path, gathers=True)
    head.start()
    assert asked.wait(60)
    assert head.take() == {}
    answered.set()


def test_store_or_disk_that_is_gone_ends_the_watch_and_nothing_else(
    store: dist.TCPStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = Watch(1, (), tmp_path / "away", gathers=True)
    head._run()

    def gone() -> None:
        raise dist.DistStoreError("gone")

    monkeypatch.setattr(watch, "_join_store", gone)
    head._run()
    assert head.take() == {}


def test_looks_come_quickly_at_first_and_then_every_five_seconds() -> None:
    pauses = watch._pauses()
    first = [next(pauses) for _ in range(9)]
    assert first[0] <= 0.1
    assert first == sorted(first)
    assert first[-2:] == [5.0, 5.0]
