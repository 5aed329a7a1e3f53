"""Protection that a process takes for itself: its memory is not for others of the same user, nor for core files.

A process of root can still read everything. Python copies secrets as it likes, so overwriting them would be no promise.
"""

import ctypes
import os
import resource
from typing import NamedTuple

from mpctf_secure.errors import EnvironmentUnfitError

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39


class Protection(NamedTuple):
    """One protection as the kernel reports it."""

    name: str
    in_force: bool
    against: str


def harden() -> None:
    """Switch all of them on, by prctl(2) and setrlimit(2); EnvironmentUnfitError where the kernel refuses.

    Children inherit them, but one that runs another program is dumpable again.
    """
    _prctl(_PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if missing := [protection.name for protection in read_back() if not protection.in_force]:
        raise EnvironmentUnfitError(f"the kernel does not protect this process: {', '.join(missing)}")


def read_back() -> list[Protection]:
    """What is in force now, asked of the kernel."""
    return [
        Protection(
            "not dumpable",
            _prctl(_PR_GET_DUMPABLE, 0) == 0,
            "other processes of this user that attach a debugger or read /proc/PID/mem",
        ),
        Protection("no core files", resource.getrlimit(resource.RLIMIT_CORE) == (0, 0), "keys on disk after a crash"),
        Protection(
            "no new privileges", _prctl(_PR_GET_NO_NEW_PRIVS, 0) == 1, "setuid programs as a way to more rights"
        ),
    ]


def _prctl(option: int, value: int) -> int:
    result: int = ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
    if result < 0:
        number = ctypes.get_errno()
        raise EnvironmentUnfitError(f"prctl({option}): {os.strerror(number)}", hint="Linux 3.5 or newer is needed")
    return result
