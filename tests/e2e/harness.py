"""A real run with real TLS and real torchrun jobs, in which a test sees both ends.

The coordinator and most participants live in this process, so that a test can compare what a participant put in with
what the coordinator received; `killable` participants are `join` processes.
"""

import asyncio
import datetime
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpctf_secure.cli import start as start_module
from mpctf_secure.cli.local_sites import hold_ceremony, prepare
from mpctf_secure.cli.own_log import own_log
from mpctf_secure.config import load
from mpctf_secure.config.run import RunConfig
from mpctf_secure.config.site import Policy, SiteConfig
from mpctf_secure.coordinator.audit import RunLog
from mpctf_secure.coordinator.journal import Journal
from mpctf_secure.coordinator.runtime import Coordinator
from mpctf_secure.errors import MpctfError
from mpctf_secure.hazmat.encoding import Reader
from mpctf_secure.identity import keystore
from mpctf_secure.identity.keys import Keys
from mpctf_secure.identity.roster import Member
from mpctf_secure.participant import agent
from mpctf_secure.participant.rounds import Participant
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.rounds.state import State
from mpctf_secure.training.launch.job import Trained
from mpctf_secure.training.spec import JobSpec
from mpctf_secure.transport.server import listen
from mpctf_secure.transport.tls import OwnTls, utc_now

PHRASE = b"of everybody here"
SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


@dataclass
class Input:
    """What one participant put into one round."""

    update: np.ndarray
    lanes: np.ndarray
    scalars: np.ndarray


@dataclass
class Recorder:
    """Handler that keeps every byte the coordinator receives; `on_upload` may interfere."""

    inner: Coordinator
    received: list[bytes] = field(default_factory=list)
    uploads: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)
    on_upload: Callable[[Member], None] = lambda _: None

    async def exchange(self, peer: Member, request: bytes) -> bytes:
        self.received.append(request)
        return await self.inner.reception.exchange(peer, request)

    async def upload(self, peer: Member, pieces: AsyncIterator[bytes]) -> bytes:
        self.on_upload(peer)
        chunks = self.uploads.setdefault((str(peer.name), self.inner.ledger.round.round), [])

        async def tapped() -> AsyncIterator[bytes]:
            async for piece in pieces:
                chunks.append(piece)
                self.received.append(piece)
                yield piece

        return await self.inner.reception.upload(peer, tapped())

    def download(self, peer: Member, request: bytes) -> AsyncIterator[bytes]:
        self.received.append(request)
        return self.inner.reception.download(peer, request)

    def turned_away(self, caller: str, reason: str) -> None:
        self.inner.reception.turned_away(caller, reason)


@dataclass
class Outcome:
    contract: Contract
    state: State
    coordinator: Coordinator
    recorder: Recorder
    inputs: dict[tuple[str, int], Input]
    encoded: dict[tuple[str, int], int]
    events: list[dict[str, object]]
    folder: Path


class ReadyJob:
    """In the place of training, where a test is about what comes after it: an update of its own for each site."""

    rows, held_out, truncated, memory, hardware_text = 32, 0, 0, 1, "nothing"
    schema = (("lora_A.weight", (4, 500)), ("lora_B.weight", (500, 4)))

    def __init__(self, spec: JobSpec, *_: object) -> None:
        self._dice = np.random.default_rng(list(Path(spec.data).name.encode()))

    def train(
        self, adapter: np.ndarray, rows: list[int], names: list[str], progress: Callable[[int, int], None]
    ) -> Trained:
        progress(1, 1)
        return Trained(
            adapter + np.float32(0.01) * self._dice.standard_normal(4000, np.float32), 1.0, len(rows), 1, 0.0
        )

    def check_finite(self, trained: Trained) -> None:
        assert trained.is_finite

    def close(self) -> None:
        pass


class RealRun:
    """Set up from a run file; `run` gives the outcome."""

    def __init__(
        self, folder: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, *, training: bool = True
    ) -> None:
        self.folder = folder
        if not training:
            monkeypatch.setattr(agent, "Job", ReadyJob)
        self.config = load.load(SMOKE, RunConfig, overrides)
        self.material = prepare(self.config, folder, SMOKE.parent)
        now = datetime.datetime.now(datetime.UTC)
        self.roster, self.keys = hold_ceremony(self.config, folder, now, PHRASE)
        self.inputs: dict[tuple[str, int], Input] = {}
        self.encoded: dict[tuple[str, int], int] = {}
        self.change: Callable[[str, int, Any], Any] = lambda name, number, contribution: contribution
        self.events: list[dict[str, object]] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.policies: dict[str, Policy] = {}
        self.failures: dict[str, MpctfError] = {}
        """With what a site's part in the run has ended, if not well."""
        self._tap_inputs(monkeypatch)

    def _tap_inputs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Participant._encode

        def encode(participant, state, contribution, context, secret):
            changed = self.change(participant._name, context.round, contribution)
            lanes, scalars = original(participant, state, changed, context, secret)
            key = participant._name, context.round
            self.encoded[key] = self.encoded.get(key, 0) + 1
            self.inputs[key] = Input(contribution.update, lanes.copy(), scalars.copy())
            return lanes, scalars

        monkeypatch.setattr(Participant, "_encode", encode)

    def site(self, name: str, address: str) -> SiteConfig:
        home = self.folder / "sites" / name
        return SiteConfig(
            coordinator=address,
            model=self.material.model,
            data=self.material.data[name],
            keys=home / "keys",
            work=home / "work",
            policy=self.policies.get(name, Policy()),
        )

    def run(
        self, *, killable: str | None = None, interfere: Callable[["RealRun", Member], None] | None = None
    ) -> Outcome:
        return asyncio.run(self._main(killable, interfere))

    async def _main(self, killable: str | None, interfere: Callable[["RealRun", Member], None] | None) -> Outcome:
        proposal = start_module._propose(
            self.config, "real-run", self.roster.hash, start_module._cohort_rules(self.config)
        )
        spool = self.folder / "spool"
        spool.mkdir()
        journal = Journal(self.folder)
        log = RunLog(self.folder, self.roster, proposal.run_id, utc_now)
        log.keep(b"", keystore.roster_files(self.folder / "sites" / "coordinator" / "keys", 1))
        record = log.recording(self._record)
        coordinator = Coordinator(
            proposal, self.config.timeouts, self.roster, self.keys, spool, record, journal, log, bytes(32)
        )
        recorder = Recorder(coordinator)
        if interfere:
            recorder.on_upload = lambda peer: interfere(self, peer)
        listener = await listen(
            "127.0.0.1:0", self.roster, OwnTls(self.keys.identity, self.roster.coordinator), recorder
        )
        address = f"127.0.0.1:{listener.port}"
        threads = []
        try:
            for name in self.config.participants.names:
                site = self.site(name, address)
                if name == killable:
                    path = self.folder / "sites" / name / "site.yaml"
                    path.write_text(load.dump(site))
                    argv = [sys.executable, "-m", "mpctf_secure", "join", str(path), "--once", "--passphrase-fd", "0"]
                    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
                    self.processes[name] = process
                    assert process.stdin
                    process.stdin.write(PHRASE)
                    process.stdin.close()
                else:
                    keys = keystore.unseal(site.keys, PHRASE)
                    threads.append(threading.Thread(target=self._take_part, args=(name, site, keys), name=name))
                    threads[-1].start()
            contract, state = await coordinator.run()
        finally:
            coordinator.reception.end("the run is over")
            for process in self.processes.values():
                process.kill()
                process.wait()
            for thread in threads:
                await asyncio.to_thread(thread.join)
            await listener.stop(1.0)
        return Outcome(contract, state, coordinator, recorder, self.inputs, self.encoded, self.events, self.folder)

    def _take_part(self, name: str, site: SiteConfig, keys: Keys) -> None:
        try:
            agent.join(site, keys, own_log(site.keys), lambda _: None)
        except MpctfError as error:
            self.failures[name] = error

    def _record(self, kind: str, **fields: object) -> None:
        self.events.append({"event": kind, **fields})


def miss_share_keys(monkeypatch: pytest.MonkeyPatch, names: Collection[str]) -> None:
    """These are late for share keys in their first attempt, as when a network blinks."""
    original, held = Recorder.exchange, set[str]()

    async def exchange(recorder: Recorder, peer: Member, request: bytes) -> bytes:
        if peer.name in names and Reader(request).text() == "shares" and peer.name not in held:
            held.add(str(peer.name))
            gate = recorder.inner.reception._find("shares", Reader(request[4 + 6 :]).bytes(), None)
            while not gate.closed:
                await asyncio.sleep(0.05)
        return await original(recorder, peer, request)

    monkeypatch.setattr(Recorder, "exchange", exchange)


def published(outcome: Outcome, round_number: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Lanes and scalars of a published sum, read from the coordinator's disk."""
    data = (outcome.folder / "spool" / f"round-{round_number}.sum").read_bytes()
    split = len(data) - 8 * next(iter(outcome.inputs.values())).scalars.size
    return np.frombuffer(data[:split], f"<u{bits // 8}"), np.frombuffer(data[split:], "<u8")
