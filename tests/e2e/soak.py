"""Hundreds of short rounds with faults by the dice of a seed: `make soak`. Real processes, TLS and torchrun.

Of four sites three are a quorum; bank-b dials through a network that is cut now and then. Whoever is killed is started
again, at once or some rounds later. At the end everybody must hold the same adapter, each round must be there once,
and nothing may be left running. Rounds STEADY are without faults of the coordinator: its memory is compared there.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from e2e.consortium import COORDINATOR, Consortium, consortium, processes_of
from e2e.proxy import Network

from mpctf_secure.coordinator.journal import Finished, Journal

SITES = ("bank-b", "hospital-a", "insurer-d", "telecom-c")
STEADY = 0.45, 0.9  # of all rounds
STALLED_SECONDS = 300.0
MOST_GROWTH = 1.1


class StalledError(Exception):
    """No round has ended for too long, or somebody has left."""


class Soak:
    """The run, and the one who disturbs it."""

    def __init__(self, joint: Consortium, network: Network, rounds: int, seed: int) -> None:
        self.joint, self.network, self.rounds = joint, network, rounds
        self.dice = random.Random(seed)  # noqa: S311 - the dice of a test
        self.faults: Counter[str] = Counter()
        self.memory: list[tuple[int, int]] = []
        """(rounds done, resident KiB of the coordinator) in the steady part."""

    def run(self) -> list[Finished]:
        """All rounds; StalledError where the run does not go on."""
        self.joint.begin()
        since, last = time.monotonic(), 0
        while (done := len(self.finished())) < self.rounds:
            time.sleep(self.dice.uniform(1.0, 12.0))
            if done > last:
                since, last = time.monotonic(), done
            if time.monotonic() - since > STALLED_SECONDS:
                raise StalledError(f"no round after {done} for {STALLED_SECONDS:.0f} s")
            for name, process in self.joint.processes.items():
                if process.poll() is not None and len(self.finished()) < self.rounds:
                    raise StalledError(f"{name} has left with exit code {process.returncode}")
            steady = self.note_memory(done)
            self.disturb(steady=steady)
        return self.finished()

    def finish(self) -> None:
        """Everybody ends by itself; who was away at the end gets the last state from the coordinator, started again."""
        self.joint.end(COORDINATOR, 0)
        late = [name for name in SITES if self.joint.processes[name].poll() is None]
        if late:
            self.faults["away at the end"] += len(late)
            self.joint.coordinator(resume=True)
        for name in SITES:
            self.joint.end(name, 0)
        if late:
            self.joint.processes[COORDINATOR].send_signal(signal.SIGINT)
            self.joint.end(COORDINATOR, 7)

    def finished(self) -> list[Finished]:
        """The rounds that are over."""
        runs = self.joint.root / COORDINATOR / "runs"
        if not list(runs.glob("*/run.sqlite")):
            return []
        return Journal.peek(self.joint.run_folder)[0]

    def note_memory(self, done: int) -> bool:
        """Whether the coordinator is left in peace at this moment."""
        steady = STEADY[0] <= done / self.rounds <= STEADY[1] and self.joint.processes[COORDINATOR].poll() is None
        if steady:
            status = Path(f"/proc/{self.joint.processes[COORDINATOR].pid}/status").read_text()
            self.memory.append((done, int(status.split("VmRSS:")[1].split()[0])))
        return steady

    def disturb(self, *, steady: bool) -> None:
        """One fault, after which everybody is there again."""
        faults: dict[str, Callable[[], None]] = {
            "site killed": lambda: self.strike(1),
            "two sites killed": lambda: self.strike(2),
            "site killed and away for a while": lambda: self.strike(1, self.dice.uniform(5, 20)),
            "site ended by SIGTERM": lambda: self.strike(1, number=signal.SIGTERM),
            "network cut": self.cut,
        }
        if not steady:
            faults |= {
                "coordinator killed": lambda: self.restart_coordinator(signal.SIGKILL),
                "coordinator interrupted by Ctrl-C": lambda: self.restart_coordinator(signal.SIGINT),
                "all killed": self.strike_all,
            }
        if len(self.finished()) >= self.rounds - 2:
            return  # the end is near: whoever is killed now would come to a coordinator that has left
        name = self.dice.choice(sorted(faults))
        faults[name]()
        self.faults[name] += 1

    def strike(self, count: int, away: float = 0.0, number: int = signal.SIGKILL) -> None:
        """End sites, and start them again some seconds later."""
        names = self.dice.sample(SITES, count)
        for name in names:
            self.end(name, number)
        time.sleep(away)
        self.start(names)

    def strike_all(self) -> None:
        """A power cut."""
        for name in (COORDINATOR, *SITES):
            self.end(name, signal.SIGKILL)
        self.joint.coordinator(resume=True)
        self.start(SITES)

    def restart_coordinator(self, number: int) -> None:
        """End it, and go on."""
        self.end(COORDINATOR, number)
        self.joint.coordinator(resume=True)

    def cut(self) -> None:
        """bank-b's network is gone for a while."""
        with self.network.down():
            time.sleep(self.dice.uniform(0.5, 15.0))

    def start(self, names: tuple[str, ...] | list[str]) -> None:
        """`join` until the run is over."""
        for name in names:
            self.joint.site(name, once=True)

    def end(self, name: str, number: int) -> None:
        """Send a signal to one that must still be there."""
        process = self.joint.processes[name]
        if process.poll() is not None:
            return  # the last round has ended meanwhile
        process.send_signal(number)
        process.wait(60)


def summary(soak: Soak, finished: list[Finished], seconds: float) -> tuple[list[str], list[str]]:
    """What happened, and what must not have."""
    joint, records = soak.joint, [row.record for row in finished]
    by_size = Counter(len(record["survivors"]) for record in records if not record["void"])
    voids = [record for record in records if record["void"]]
    lines = [
        f"{len(records)} rounds in {seconds / 60:.1f} min, {sum(soak.faults.values())} faults",
        *(f"  {count} × {name}" for name, count in sorted(soak.faults.items())),
        *(f"  {count} rounds with {size} of {len(SITES)}" for size, count in sorted(by_size.items(), reverse=True)),
        f"  {len(voids)} rounds void; {sum(record['attempts'] > 1 for record in records)} with more than one attempt",
        *sorted({f"    void: {record['void']}" for record in voids}),
    ]
    failures = []
    if [record["round"] for record in records] != list(range(1, soak.rounds + 1)):
        failures.append("not every round is there once")
    if joint.site_adapters() != {joint.adapter()}:
        failures.append("not everybody holds the same adapter")
    if len(soak.memory) > 1:
        (begin, before), (end, after) = soak.memory[len(soak.memory) // 10], soak.memory[-1]
        lines.append(f"  coordinator: {before >> 10} MiB after round {begin}, {after >> 10} MiB after round {end}")
        if after > MOST_GROWTH * before:
            failures.append("the coordinator's memory grows")
    failures += [f"left running: {line}" for line in processes_of(joint.root)]
    return lines, failures


def main() -> int:
    """Run it; 1 if something that must hold does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    stages = {"join": 120, "training": 120, "stage": 10, "absence": 240}
    with (
        tempfile.TemporaryDirectory() as folder,
        consortium(
            Path(folder) / "joint", SITES, rounds=options.rounds, timeouts=stages,
            secagg={"void_rounds": max(options.rounds // 3, 1)},
        ) as joint,
        Network(joint.address) as network,
    ):  # fmt: skip
        for name in SITES:
            address = network.address if name == SITES[0] else joint.address
            joint.write_site(name, address, policy={"most_void_rounds": options.rounds})
        soak = Soak(joint, network, options.rounds, options.seed)
        try:
            finished = soak.run()
            soak.finish()
        except (AssertionError, StalledError) as error:
            print(f"FAILED with {dict(soak.faults)}: {error}")
            for name in (COORDINATOR, *SITES):
                print(f"--- {name}", *joint.log(name).splitlines()[-30:], sep="\n")
            return 1
        lines, failures = summary(soak, finished, time.monotonic() - began)
    print(*lines, *(f"FAILED: {failure}" for failure in failures), sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
