"""A cluster on this machine: sbatch, srun and scancel as in Slurm 22.05, as far as a job of ours asks. Its nodes are
processes. A job outlives the sbatch that waits for it; when it is cancelled, all that it started gets a SIGTERM."""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

_LOOK_SECONDS = 0.05
ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


class Cluster:
    """`path` belongs in front of PATH; while there is the file `closed`, jobs wait in the queue."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path, self.closed = folder / "bin", folder / "closed"
        for name in ("bin", "jobs"):
            (folder / name).mkdir(parents=True)
        for name in COMMANDS:
            command = shlex.join([sys.executable, __file__, str(folder), name])
            (self.path / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (self.path / name).chmod(0o700)

    def jobs(self) -> list[str]:
        """Names of those that wait or run."""
        return [path.name for path in (self._folder / "jobs").iterdir() if path.suffix != ".part"]

    def cancel(self) -> None:
        """All of them."""
        for name in self.jobs():
            _cancel(self._folder, name)


def _cancel(folder: Path, name: str) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.killpg(int((folder / "jobs" / name).read_text()), signal.SIGTERM)


def sbatch(folder: Path, arguments: list[str]) -> int:
    """Submit what is on standard input, and wait for its end."""
    parser = argparse.ArgumentParser()
    for flag in ("--wait", "--parsable", "--no-requeue"):
        parser.add_argument(flag, action="store_true", required=True)
    for option in ("--job-name", "--nodes", "--ntasks-per-node", "--open-mode", "--output"):
        parser.add_argument(option, required=True)
    options = parser.parse_args(arguments)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # it is taken whole, or not at all
    script, entry = folder / f"{options.job_name}.sh", folder / "jobs" / options.job_name
    script.write_text(sys.stdin.read())
    if "#SBATCH --partition=none\n" in script.read_text():
        print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
        return 1
    with Path(options.output.replace("%%", "%")).open("ab") as log:
        command = [sys.executable, __file__, str(folder), "job", options.job_name]
        job = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    entry.with_suffix(".part").write_text(str(job.pid))
    entry.with_suffix(".part").rename(entry)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    print(job.pid, flush=True)
    return job.wait()


def job(folder: Path, arguments: list[str]) -> int:
    """Wait until it is in the list and the queue is open, then run the script on the first node."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    entry = folder / "jobs" / arguments[0]
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        while not entry.exists() or (folder / "closed").exists():
            time.sleep(_LOOK_SECONDS)
        with subprocess.Popen(["sh", folder / f"{arguments[0]}.sh"]) as script:
            return script.wait()
    finally:
        entry.unlink()


def srun(_: Path, arguments: list[str]) -> int:
    """The command on each node; where one fails, the others end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, required=True)
    for option in ("--ntasks-per-node", "--kill-on-bad-exit", "--cpu-bind", "--export"):
        parser.add_argument(option, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    tasks = [
        subprocess.Popen(options.command, env={**os.environ, "SLURM_NODEID": str(node)}, process_group=0)
        for node in range(options.nodes)
    ]
    ending = []
    signal.signal(signal.SIGTERM, lambda *_: ending.append(True))
    while None in (codes := [task.poll() for task in tasks]):
        if any(codes) or ending:
            _end(tasks)
        time.sleep(_LOOK_SECONDS)
    return max(map(abs, codes))


def _end(tasks: list[subprocess.Popen[bytes]]) -> None:
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, signal.SIGTERM)
    for task in tasks:
        task.wait()


def scancel(folder: Path, arguments: list[str]) -> int:
    """By name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quiet", action="store_true", required=True)
    parser.add_argument("--name", required=True)
    _cancel(folder, parser.parse_args(arguments).name)
    return 0


COMMANDS = {"sbatch": sbatch, "srun": srun, "scancel": scancel, "job": job}

if __name__ == "__main__":
    sys.exit(COMMANDS[sys.argv[2]](Path(sys.argv[1]), sys.argv[3:]))
