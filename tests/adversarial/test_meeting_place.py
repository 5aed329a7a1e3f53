"""What somebody on a node's network can do to the place where torchrun's processes meet: c10d over TCP unpickles it."""

import base64
import datetime
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from e2e import sshd
from torch.distributed import TCPStore

from mpctf_secure.training.launch.scripts import Rendezvous, launcher

WORKER = """
import os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
(here / f"up-{os.environ['RANK']}").touch()
while not (here / "over").exists():
    time.sleep(0.05)
"""
TO_FILE = '--rdzv-conf=store_type=file --rdzv-endpoint="$logs/meeting"'


class Planted:
    """Pickled, it is a call; unpickled, the call is made."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self._trace,)


@contextmanager
def running(folder: Path, *commands: str) -> Iterator[list[psutil.Process]]:
    """A job whose processes do nothing until the block ends, and its torchruns."""
    (folder / "worker.py").write_text(WORKER)
    environment = {**os.environ, "logs": str(folder)}
    shells = [
        subprocess.Popen(["sh", "-c", f"exec {one} {folder}/worker.py {folder}"], env=environment) for one in commands
    ]
    try:
        while not all((folder / f"up-{rank}").exists() for rank in range(2)):
            assert all(shell.poll() is None for shell in shells)
        yield [psutil.Process(shell.pid) for shell in shells]
    finally:
        (folder / "over").touch()
        for shell in shells:
            shell.wait()


def stores(torchruns: list[psutil.Process]) -> list[TCPStore]:
    ports = {c.laddr.port for one in torchruns for c in one.net_connections() if c.status == psutil.CONN_LISTEN}
    wait = datetime.timedelta(seconds=10)
    return [TCPStore("127.0.0.1", port, is_master=False, timeout=wait) for port in ports]


def plant(torchruns: list[psutil.Process], trace: Path) -> int:
    """Wherever there is something that torchrun will unpickle; how often."""
    targets = [(store, key) for store in stores(torchruns) for key in store.list_keys() if "torch.rendezvous" in key]
    for store, key in targets:
        store.set(key, base64.b64encode(pickle.dumps(Planted(trace))))
    return len(targets)


@pytest.mark.slow
def test_whoever_reaches_a_store_of_c10d_runs_code_there(tmp_path: Path) -> None:
    command = launcher(Rendezvous("cafe", 1, 2, ""), sys.executable, "0")
    assert TO_FILE in command
    with running(tmp_path, command.replace(TO_FILE, "--rdzv-endpoint=127.0.0.1:0")) as torchruns:
        assert plant(torchruns, tmp_path / "trace")
        while not (tmp_path / "trace").exists():
            pass


@pytest.mark.parametrize("nodes", [1, 2])
def test_stores_of_our_jobs_hold_nothing_that_is_unpickled(tmp_path: Path, nodes: int) -> None:
    meeting = Rendezvous("cafe", nodes, 2 // nodes, f"[127.0.0.1]:{sshd.free_port()}")
    with running(tmp_path, *(launcher(meeting, sys.executable, str(number)) for number in range(nodes))) as torchruns:
        assert stores(torchruns)
        assert not plant(torchruns, tmp_path / "trace")
