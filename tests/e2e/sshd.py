"""Nodes on this machine: real sshd on loopback addresses, with keys of the test."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
ADDRESSES = ("127.0.0.1", "127.0.0.2")


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as listener:
        listener.bind((address, 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(folder: Path) -> Iterator[int]:
    """The port of an sshd on both addresses; `folder` then holds host_key, user_key and known_hosts."""
    folder.mkdir()
    port = free_port()
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized")
    public = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"[{address}]:{port} {public}" for address in ADDRESSES))
    (folder / "config").write_text(
        "".join(f"ListenAddress {address}:{port}\n" for address in ADDRESSES)
        + f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized\nPidFile none\nStrictModes no\n"
        "UsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(folder / "config")], stderr=log)
    try:
        _await(port)
        yield port
    finally:
        server.terminate()
        server.wait()


def _await(port: int) -> None:
    """Until something listens; the test's own time limit ends this."""
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((ADDRESSES[-1], port)):
            return
