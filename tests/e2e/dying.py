"""The program, made to kill itself at a chosen instant: dying.py MODULE:CLASS.METHOD N before|after -- ARGUMENTS

It dies by SIGKILL in the N-th call (from 0) of that method; N = -1: never. $CLOCK_FILE, where it is set, names a file
with the seconds by which its clock is wrong (the program's; TLS has the machine's). What a run's result depends on by
chance, the secret behind the rounding bits, is fixed by the organisation's name: two runs can be compared bit by bit.
"""

import datetime
import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpctf_secure.cli import app
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity import keystore
from mpctf_secure.transport import tls


def dying(original: Callable[..., Any], at: int, when: str) -> Callable[..., Any]:
    calls = 0

    def method(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        number, calls = calls, calls + 1
        if number == at and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **named)
        if number == at and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return method


class WrongClock:
    """In the place of the module `datetime` where the program reads the wall clock."""

    UTC = datetime.UTC
    datetime: Any

    def __init__(self, path: Path) -> None:
        self.datetime, self._path = self, path

    def now(self, zone: datetime.tzinfo) -> datetime.datetime:
        return datetime.datetime.now(zone) + datetime.timedelta(seconds=float(self._path.read_text()))


def fixed_secret(folder: Path, run_id: str) -> bytes:
    drawn(folder, run_id)
    return sha256(keystore.organisation(folder).name.encode())


if __name__ == "__main__":
    where, at, when, _, *arguments = sys.argv[1:]
    module_name, _, path = where.partition(":")
    owner: Any = importlib.import_module(module_name)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, dying(getattr(owner, name), int(at), when))
    if "CLOCK_FILE" in os.environ:
        tls.datetime = WrongClock(Path(os.environ["CLOCK_FILE"]))  # type: ignore[assignment]
    drawn, keystore.run_secret = keystore.run_secret, fixed_secret
    sys.argv = ["mpctf-secure", *arguments]
    app.main()
