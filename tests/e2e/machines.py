"""Machines on this machine: network namespaces with one cable each to a switch beside the coordinator's. Needs root."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Self

ADDRESS = "10.77.0.1"
"""The coordinator's."""


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def lacking() -> str | None:
    """Why there can be none here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and iproute2"
    name = f"mpctf-{os.getpid()}-try"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "no network namespaces here"
    ip("netns", "delete", name)
    return None


class Machines:
    """One namespace for `coordinator` with a switch, one for each of `sites`; all go at the end of the block."""

    def __init__(self, coordinator: str, sites: Sequence[str]) -> None:
        self._coordinator, self._sites = coordinator, tuple(sites)

    def __enter__(self) -> Self:
        self._boot(self._coordinator)
        self._in(self._coordinator, "link", "add", "switch", "type", "bridge")
        self._in(self._coordinator, "address", "add", f"{ADDRESS}/24", "dev", "switch")
        self._in(self._coordinator, "link", "set", "switch", "up")
        for name in self._sites:
            self._plug_in(name)
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self._sites, self._coordinator):
            self._die(name)

    def prefix(self, name: str) -> list[str]:
        """What runs a command on a machine."""
        return ["ip", "netns", "exec", self._namespace(name)]

    def reboot(self, name: str) -> None:
        """The cable first, so that nobody hears of it; then everything on it at once, and a bare machine again."""
        self._in(self._coordinator, "link", "delete", f"port-{self._sites.index(name)}")
        self._die(name)
        self._plug_in(name)

    def _namespace(self, name: str) -> str:
        return f"mpctf-{os.getpid()}-{name}"

    def _in(self, name: str, *arguments: str) -> None:
        ip("-netns", self._namespace(name), *arguments)

    def _boot(self, name: str) -> None:
        ip("netns", "add", self._namespace(name))
        self._in(name, "link", "set", "lo", "up")

    def _plug_in(self, name: str) -> None:
        self._boot(name)
        number, far = self._sites.index(name), self._namespace(self._coordinator)
        self._in(name, "link", "add", "cable", "type", "veth", "peer", "name", f"port-{number}", "netns", far)
        self._in(name, "address", "add", f"10.77.0.{number + 2}/24", "dev", "cable")
        self._in(name, "link", "set", "cable", "up")
        self._in(self._coordinator, "link", "set", f"port-{number}", "master", "switch", "up")

    def _die(self, name: str) -> None:
        for process in ip("netns", "pids", self._namespace(name)).split():
            with contextlib.suppress(ProcessLookupError):  # ended by itself in between
                os.kill(int(process), 9)
        ip("netns", "delete", self._namespace(name))
