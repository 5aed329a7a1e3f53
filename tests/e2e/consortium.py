"""Organisations on this machine, each a folder with its own processes, which tests start, kill and start again."""

import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from mpctf_secure.config import load
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.experiments.intents import write_intents
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity import ceremony
from mpctf_secure.ids import ParticipantName
from mpctf_secure.training.rows import load_rows

DYING = Path(__file__).parent / "dying.py"
COORDINATOR = ParticipantName("registry-x")
NEVER = ("mpctf_secure.coordinator.journal:Journal.add", -1, "before")
PHRASE = b"one passphrase for all of them"
Death = tuple[str, int, str]
THREE = ("bank-b", "hospital-a", "telecom-c")
FOUR = ("bank-b", "hospital-a", "insurer-d", "telecom-c")
ROUNDS = 3


class Consortium:
    """A coordinator and sites with a roster, model and data; nothing runs yet."""

    def __init__(self, root: Path, names: Sequence[str], **settings: object) -> None:
        self.root, self.names = root, tuple(names)
        self.prefix: Callable[[str], list[str]] = lambda _: []
        """What an organisation's commands begin with."""
        self.environment: dict[str, dict[str, str]] = {}
        """What its commands have in their environment besides ours."""
        ceremony.hold(
            {ParticipantName(name): root / name / "keys" for name in (*names, COORDINATOR)},
            COORDINATOR, datetime.datetime.now(datetime.UTC), PHRASE,
        )  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = str(settings.pop("listen", f"127.0.0.1:{free.getsockname()[1]}"))
        write_intents(root / "data", names, 64, 12, 0)
        texts = [
            m.content for name in names for row in load_rows(root / "data" / f"{name}.jsonl") for m in row.messages
        ]
        write_tiny_llama(root / "model", texts)
        for name in names:
            self.write_site(name, self.address)
        lines = {
            "run": "joint",
            "participants": list(names),
            "listen": self.address,
            "model": {"base": "tiny", "lora": {"r": 4, "alpha": 8}},
            "training": {"learning_rate": 3e-3, "max_length": 128},
            "data": {"size": 16},
            # With moments, and another factor each round: what has to survive a crash.
            "aggregation": {"strategy": "fedadam", "lora": "alternating", "server_learning_rate": 1e-2},
            "timeouts": {"join": 120, "training": 120, "stage": 60, "absence": 60},
            **settings,
        }
        (root / COORDINATOR / "run.yaml").write_text(json.dumps(lines))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def write_site(self, name: str, address: str, **settings: object) -> None:
        """site.yaml, dialling out to an address."""
        paths = {"model": self.root / "model", "data": self.root / "data" / f"{name}.jsonl"}
        site = SiteConfig.model_validate({"coordinator": address, **paths, **settings})
        (self.root / name / "site.yaml").write_text(load.dump(site))

    @property
    def run_folder(self) -> Path:
        """The newest run's."""
        return max((self.root / COORDINATOR / "runs").iterdir(), key=lambda path: path.stat().st_ctime)

    def coordinator(self, death: Death = NEVER, *, resume: bool = False) -> subprocess.Popen[bytes]:
        """`start`, or `runs resume` of the newest run."""
        command = ["runs", "resume", self.run_folder.name] if resume else ["start", "run.yaml"]
        return self._spawn(COORDINATOR, death, [*command, "--passphrase-fd", "0"])

    def site(
        self, name: str, death: Death = NEVER, *, once: bool = False, flags: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """`join`."""
        said = [*flags, *(["--once"] if once else []), "--passphrase-fd", "0"]
        return self._spawn(name, death, ["join", "site.yaml", *said])

    def begin(self) -> None:
        """The coordinator, and every site until the run is over."""
        self.coordinator()
        for name in self.names:
            self.site(name, once=True)

    def serve_the_end(self) -> None:
        """`runs resume` of a run that is done; returns when it serves."""
        before = self.log(COORDINATOR).count("the run is done: waiting")
        self.coordinator(resume=True)
        self.wait_for(lambda: self.log(COORDINATOR).count("the run is done: waiting") > before)

    def command(self, name: str, *arguments: str) -> str:
        """What a command prints that needs no passphrase, in the organisation's folder."""
        command = [sys.executable, "-m", "mpctf_secure", *arguments]
        return subprocess.run(command, cwd=self.root / name, check=True, stdout=subprocess.PIPE, text=True).stdout

    def _spawn(self, name: str, death: Death, command: list[str]) -> subprocess.Popen[bytes]:
        home = self.root / name
        with (home / "log").open("ab") as log:
            process = subprocess.Popen(
                [*self.prefix(name), sys.executable, str(DYING), death[0], str(death[1]), death[2], "--", *command],
                cwd=home, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment.get(name, {})},
            )  # fmt: skip
        assert process.stdin
        process.stdin.write(PHRASE)
        process.stdin.close()
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        return (self.root / name / "log").read_text()

    def kill(self, name: str) -> None:
        """kill -9, as a power cut does to all of an organisation's processes."""
        self.processes[name].kill()
        self.processes[name].wait()

    def events(self) -> list[dict[str, object]]:
        path = self.run_folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Poll what other processes write; fails with everybody's log."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "\n".join(f"--- {n}\n{self.log(n)}" for n in self.processes)
            time.sleep(0.05)

    def wait_for_event(self, kind: str, count: int = 1) -> None:
        def seen() -> bool:
            runs = self.root / COORDINATOR / "runs"
            return any(runs.glob("*")) and sum(event["event"] == kind for event in self.events()) >= count

        self.wait_for(seen)

    def end(self, name: str, code: int, seconds: float = 240) -> None:
        """A process is expected to end by itself."""
        try:
            found = self.processes[name].wait(seconds)
        except subprocess.TimeoutExpired:
            found = None
        assert found == code, "\n".join(f"--- {n}\n{self.log(n)}" for n in self.processes)

    def end_well(self) -> None:
        """The run ends by itself, and every `join --once` with it."""
        self.end(COORDINATOR, 0)
        for name in self.names:
            self.end(name, 0)

    def report(self) -> dict[str, object]:
        return json.loads((self.run_folder / "report.json").read_text())

    def adapter(self) -> str:
        return sha256((self.run_folder / "adapter" / "adapter_model.safetensors").read_bytes()).hex()

    def site_adapters(self) -> set[str]:
        """What the sites themselves have computed."""
        run = self.run_folder.name
        paths = [
            self.root / name / "work" / "runs" / run / "adapter" / "adapter_model.safetensors" for name in self.names
        ]
        return {sha256(path.read_bytes()).hex() for path in paths if path.exists()}

    def clear(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if process.poll() is None:
                process.kill()
                process.wait()


@contextlib.contextmanager
def consortium(root: Path, names: Sequence[str], **settings: object) -> Iterator[Consortium]:
    made = Consortium(root, names, **settings)
    try:
        yield made
    finally:
        made.clear()
        shutil.rmtree(root, ignore_errors=True)


def assert_complete(joint: Consortium) -> None:
    """Every round of THREE has everybody, and was told once."""
    rounds = joint.report()["rounds"]
    assert [record["survivors"] for record in rounds] == [list(THREE)] * ROUNDS
    assert not [record for record in rounds if record["dropouts"] or record["void"]]
    told = [(event["event"], event.get("round")) for event in joint.events()]
    for number in range(1, ROUNDS + 1):  # after a kill twice maybe, but never not at all
        assert {("round_started", number), ("sum_opened", number), ("round_finished", number)} <= set(told)
    assert ("contract_accepted", None) in told
    assert told[-1] == ("run_ended", None)


def workers_of(pid: int) -> list[int]:
    """The training processes below a process, neither shell nor torchrun."""
    below = psutil.Process(pid).children(recursive=True)
    return [child.pid for child in below if "-u" in child.cmdline()]


def processes_of(folder: Path) -> list[str]:
    """Command lines, of any process, that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and int(path.parent.name) != os.getpid():
            found.append(line)
    return found
