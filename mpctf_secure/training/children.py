"""Starting child processes that never outlive their parent, and ending them."""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 5.0

# Loaded before any fork: between fork and exec, only the call itself may run.
_LIBC = ctypes.CDLL(None, use_errno=True)

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
"""Nothing is fetched at run time; and in logs people look for causes."""


def die_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel for this signal when the parent ends, even by SIGKILL."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, by)


def spawn(
    argv: Sequence[str],
    log: Path,
    extra: Mapping[str, str] | None = None,
    keep: Sequence[int] = (),
    script: str | None = None,
) -> subprocess.Popen[bytes]:
    """A child in a process group of its own, its output in `log`, offline, dying with this process.

    It inherits the file descriptors in `keep` and no others. Its input is `script` and stays open, or there is none.
    """
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as output:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL if script is None else subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **OFFLINE, **(extra or {})},
            start_new_session=True,
            pass_fds=keep,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
    if script is not None and child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # how it ended is seen from its exit code
            child.stdin.write(script.encode())
            child.stdin.flush()
    return child


def end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to every group, SIGKILL after the grace period; returns when all are gone."""
    for child in children:
        _signal_group(child, signal.SIGTERM)
    for child in children:
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            _signal_group(child, signal.SIGKILL)
            child.wait()


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    if child.poll() is None:
        os.killpg(child.pid, number)
