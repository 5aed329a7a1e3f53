"""A whole round on loopback, secure and in the clear: the same coordinator, TLS, spool, codec and state.

Every participant is a process with its own channel; training is replaced by a ready update. In the clear the key
stages, masks and sealed files are left out; everything else is the program's own code. Used by secagg.py --round and
load.py.
"""

import asyncio
import datetime
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpctf_secure.cli.own_log import own_log
from mpctf_secure.config.privacy import NoNoise
from mpctf_secure.config.run import Lora, Timeouts
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.config.strategies import FedAvg, FixedSize
from mpctf_secure.config.training import Training
from mpctf_secure.coordinator import runtime
from mpctf_secure.coordinator.attempt import Stages
from mpctf_secure.coordinator.audit import RunLog
from mpctf_secure.coordinator.gate import Gate
from mpctf_secure.coordinator.journal import Journal
from mpctf_secure.coordinator.runtime import Coordinator
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity import ceremony, keystore
from mpctf_secure.ids import IdentityKey, ParticipantName
from mpctf_secure.parallel import ordered_map
from mpctf_secure.participant import agent
from mpctf_secure.participant.rounds import Participant
from mpctf_secure.quorum import default_colluders, default_quorum
from mpctf_secure.rounds.contract import Proposal
from mpctf_secure.rounds.messages import ModelHashes
from mpctf_secure.secagg.chunks import digest
from mpctf_secure.secagg.masks import MaskedInput
from mpctf_secure.secagg.messages import Signed, Survivors
from mpctf_secure.secagg.server import Server
from mpctf_secure.training.launch.job import Trained
from mpctf_secure.transport.server import listen
from mpctf_secure.transport.tls import OwnTls, utc_now

SHAPE = (16, 4096)


class ReadyJob:
    """A training job that has its update ready."""

    rows, held_out, truncated, memory, hardware_text = 64, 0, 0, 1, "nothing"

    def __init__(self, spec: object, site: SiteConfig, *_: object) -> None:
        count = int((site.work / "tensors").read_text())
        self.schema = tuple((f"layer-{number:05}.lora_A.weight", SHAPE) for number in range(count))
        draw = np.random.default_rng(0).standard_normal(count * SHAPE[0] * SHAPE[1], dtype=np.float32)
        self.update = np.float32(1e-4) * draw

    def train(self, adapter: np.ndarray, rows: list[int], names: object, progress: object) -> Trained:
        """The update, at once: what is left of the training stage is the program's own clipping and waiting."""
        return Trained(adapter + self.update, 1.0, len(rows), 1, 0.0)

    def check_finite(self, _: Trained) -> None:
        """It is."""

    def close(self) -> None:
        """Nothing to close."""


def take_part_in_the_clear(site: Participant, state: Any, contribution: Any, _: Any, announce: Any) -> None:
    """Upload the quantised update as it is."""
    context = site._context(state, announce)
    ctx = context.digest()
    plain = MaskedInput(context.layout, *site._encode(state, contribution, context, b""), ())

    def stream(first: int) -> Iterator[bytes]:
        def hashed(number: int) -> tuple[bytes, bytes]:
            chunk = plain.chunk(number)
            return chunk, sha256(chunk)

        yield enc(ctx, context.layout.size, first)
        hashes = []
        for chunk, chunk_hash in ordered_map(hashed, range(len(context.layout.sizes))):
            hashes.append(chunk_hash)
            yield chunk
        yield Signed.make("upload", ctx, site._key, enc(digest(hashes))).encode()

    site._link.upload(stream, ctx, "ack")


class ClearServer(Server):
    """Everybody survives and nothing is masked."""

    @property
    def survivors(self) -> tuple[IdentityKey, ...]:
        """The cohort."""
        return self.context.cohort

    @property
    def claim(self) -> Survivors:
        """That it is."""
        return Survivors(bytes(32), self.survivors, self.survivors, (bytes(32),) * len(self.survivors))


async def aggregate_in_the_clear(stages: Stages, ready: Gate) -> tuple[Gate, tuple[()]]:
    """One stage: the uploads."""
    uploads = stages._stage("upload", lambda sender, _: stages._spool.keep(sender))
    stages._announce(ready)
    await uploads.collect(600, len(stages._context.cohort))
    stages._ledger.note_stage(uploads, "masked input")
    return uploads, ()


NO_MODEL = ModelHashes(*[bytes(32)] * 3)


def participant(setting: dict[str, Any]) -> None:
    """The child: one site."""
    agent.Job, agent.hash_model, agent.load_rows = ReadyJob, lambda *_: NO_MODEL, lambda _: []  # type: ignore[misc]
    if setting["clear"]:
        Participant._take_part = take_part_in_the_clear  # type: ignore[method-assign]
    home = Path(setting["home"])
    work = home / "work"
    paths = {"model": home, "data": work / "tensors", "keys": home / "keys", "work": work}
    site = SiteConfig(coordinator=setting["address"], **paths)
    agent.join(site, keystore.unseal(site.keys, b"x"), own_log(site.keys), lambda _: None)


async def run(folder: Path, dimension: int, members: int, rounds: int, *, clear: bool) -> list[dict[str, Any]]:
    """What report.json says of every round; the first is in the 32-bit ring."""
    names = tuple(ParticipantName(f"site-{number:03}") for number in range(members))
    homes = {name: folder / name / "keys" for name in (*names, ParticipantName("coordinator"))}
    roster = ceremony.hold(homes, ParticipantName("coordinator"), datetime.datetime.now(datetime.UTC), b"x")
    keys = keystore.unseal(homes[ParticipantName("coordinator")], b"x")
    colluders = default_colluders(members)
    proposal = Proposal(
        run_id="bench", roster_hash=roster.hash.hex(), participants=names, quorum=default_quorum(members, colluders),
        colluders=colluders, allow_pair=False, rounds=rounds, void_rounds=0, seed=1, base_model="none", lora=Lora(),
        training=Training(), data=FixedSize(size=64), aggregation=FedAvg(), privacy=NoNoise(clip_norm=10.0),
    )  # fmt: skip
    (folder / "spool").mkdir()
    journal = Journal(folder)
    log = RunLog(folder, roster, "bench", utc_now)
    record = log.recording(lambda *_, **__: None)
    times = Timeouts(join=60)
    coordinator = Coordinator(proposal, times, roster, keys, folder / "spool", record, journal, log, b"")
    if clear:
        runtime.Server = ClearServer  # type: ignore[misc]
        Stages.aggregate = aggregate_in_the_clear  # type: ignore[method-assign, assignment]
    listener = await listen("127.0.0.1:0", roster, OwnTls(keys.identity, roster.coordinator), coordinator.reception)
    children = []
    for name in names:
        (folder / name / "work").mkdir()
        (folder / name / "work" / "tensors").write_text(str(dimension // (SHAPE[0] * SHAPE[1])))
        setting = {"home": str(folder / name), "address": f"127.0.0.1:{listener.port}", "clear": clear}
        argv = [sys.executable, __file__, "participant", json.dumps(setting)]
        children.append(subprocess.Popen(argv))
    try:
        await coordinator.run()
        coordinator.reception.end("the run is over")
        return coordinator.reports
    finally:
        await asyncio.to_thread(lambda: [child.wait(60) for child in children])
        await listener.stop(1.0)


def compare(dimension: int, members: int) -> tuple[float, float]:
    """Median seconds of a whole round in the 16-bit ring, in which training takes no time: (secure, in the clear)."""
    took = []
    for mode in ("secure", "clear"):
        rounds = [record["seconds"] for record in measure(mode, dimension, members, 9)["rounds"]]
        for seconds in rounds[1:]:
            print(f"  {mode}: " + ", ".join(f"{stage} {took:.2f}" for stage, took in seconds.items()))
        took.append(statistics.median(sum(seconds.values()) for seconds in rounds[1:]))
    return took[0], took[1]


def measure(mode: str, dimension: int, members: int, rounds: int) -> dict[str, Any]:
    """One run in a process of its own: `rounds` as in report.json, and the coordinator's peak memory in bytes and
    seconds on the CPU."""
    argv = [sys.executable, __file__, mode, str(dimension), str(members), str(rounds)]
    found: dict[str, Any] = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def main() -> None:
    """One run, or one participant of it."""
    if sys.argv[1] == "participant":
        participant(json.loads(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        clear, sizes = sys.argv[1] == "clear", map(int, sys.argv[2:])
        rounds = asyncio.run(run(Path(folder), *sizes, clear=clear))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps({"rounds": rounds, "memory": memory, "cpu": time.process_time()}))


if __name__ == "__main__":
    main()
