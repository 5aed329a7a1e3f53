"""The coordinator with its journal on disk, and sites that say what a test wants."""

import asyncio
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loops import in_loop
from samples import make_proposal

from mpctf_secure.auditlog.note import Note
from mpctf_secure.config.run import Timeouts
from mpctf_secure.coordinator.audit import RunLog
from mpctf_secure.coordinator.journal import Journal
from mpctf_secure.coordinator.runtime import Coordinator
from mpctf_secure.errors import ParticipationError
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.identity import ceremony, keystore
from mpctf_secure.ids import ParticipantName
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.rounds.messages import Facts, ModelHashes, Position, Witnessed
from mpctf_secure.rounds.state import initial_state
from mpctf_secure.secagg.messages import Signed
from mpctf_secure.transport.tls import utc_now

NAMES = ("bank-b", "hospital-a", "telecom-c")
NO_MODEL = ModelHashes(*[bytes(32)] * 3)
FACTS = Facts(bytes(32), NO_MODEL, (("m.lora_A.weight", (4, 100)),))


class World:
    """One run folder; `begin` is what a start, or a start after a crash, does."""

    def __init__(self, home: Path) -> None:
        self.home = home
        folders = {ParticipantName(name): home / name for name in (*NAMES, "coordinator")}
        self.roster = ceremony.hold(folders, ParticipantName("coordinator"), datetime.datetime.now(datetime.UTC), b"x")
        self.sealed = {name: keystore.unseal(home / name, b"x") for name in (*NAMES, "coordinator")}
        self.keys = {name: keys.identity for name, keys in self.sealed.items()}
        self.peers = {str(member.name): member for member in self.roster.members}
        self.events: list[str] = []
        self.calls: set[asyncio.Task[bytes]] = set()

    def begin(self) -> "asyncio.Task[Any]":
        terms = make_proposal(self.roster, NAMES)
        self.journal = Journal(self.home)
        (self.home / "spool").mkdir(exist_ok=True)
        times = Timeouts(join=60, training=60, stage=1, absence=60)
        log = RunLog(self.home, self.roster, terms.run_id, utc_now)
        self.coordinator = Coordinator(
            terms,
            times,
            self.roster,
            self.sealed["coordinator"],
            self.home / "spool",
            log.recording(self.record),
            self.journal,
            log,
            bytes(32),
        )
        return asyncio.create_task(self.coordinator.run())

    def record(self, kind: str, **_: object) -> None:
        self.events.append(kind)

    def say(self, name: str, label: str, ctx: bytes, body: bytes = b"") -> None:
        """A message that is under way; its answer is of no interest."""
        message = enc(label, ctx, Signed.make(label, ctx, self.keys[name], body).encode())
        call = asyncio.create_task(self.coordinator.reception.exchange(self.peers[name], message))
        self.calls.add(call)

    def all_say(self, label: str, ctx: bytes, body: bytes = b"") -> None:
        for name in NAMES:
            self.say(name, label, ctx, body)

    def accept(self, name: str, contract: Contract, choice: bytes = b"{}") -> None:
        """The contract, having seen the log's beginning."""
        note = Note.decode((self.home / "audit" / "steps" / "0").read_bytes())
        cosignature = note.cosigned(name, self.sealed[name].log, 1_893_456_000).signature
        self.say(name, "accept", contract.run_context, Witnessed(choice, cosignature, bytes(32)).encode())

    async def until_contract(self) -> Contract:
        """All have joined."""
        await until(self.coordinator.reception.live.is_set)
        self.all_say("facts", self.roster.hash, FACTS.encode())
        await until(lambda: self.coordinator.contract)
        assert self.coordinator.contract
        return self.coordinator.contract

    async def until_ready(self) -> Contract:
        """All have joined, accepted, and are ready for round 1."""
        contract = await self.until_contract()
        for name in NAMES:
            self.accept(name, contract)
        await until(lambda: "contract_accepted" in self.events)
        self.all_say("ready", contract.run_context, Position(1, initial_state(contract).hash(contract)).encode())
        return contract

    async def crash(self, running: "asyncio.Task[Any]") -> None:
        for task in (running, *self.calls):
            task.cancel()
        await asyncio.gather(running, *self.calls, return_exceptions=True)
        self.calls.clear()
        self.journal.close()
        self.events.clear()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("stage", ["facts", "accept"])
@in_loop
async def test_run_does_not_begin_without_one_who_is_out_by_then(world: World, stage: str) -> None:
    """Else it would begin with whoever is left, or with nobody: what is missing counts, not who is waited for."""
    running = world.begin()
    if stage == "accept":
        contract = await world.until_contract()
        world.accept("bank-b", contract)
    else:
        await until(world.coordinator.reception.live.is_set)
        world.all_say("facts", world.roster.hash, FACTS.encode())
    await asyncio.sleep(0)
    world.coordinator.reception.ban(world.peers["bank-b"].identity, "not in roster version 2")
    with pytest.raises(ParticipationError, match=r"not everyone .*: bank-b \(not in roster version 2\)") as caught:
        await running
    assert caught.value.exit_code == 5
    assert "contract_accepted" not in world.events


@in_loop
async def test_site_that_mends_its_model_before_the_run_begins_joins_with_what_it_has_then(world: World) -> None:
    running = world.begin()
    await until(world.coordinator.reception.live.is_set)
    other = Facts(bytes(32), NO_MODEL._replace(weights=b"\1" * 32), FACTS.tensors)
    world.say("bank-b", "facts", world.roster.hash, other.encode())
    await asyncio.sleep(0.01)
    await world.until_ready()
    await until(lambda: "round_started" in world.events)
    await world.crash(running)
    again = world.begin()
    await until(world.coordinator.reception.live.is_set)
    assert world.coordinator.contract
    assert world.coordinator.contract.base_model_hash == NO_MODEL.whole.hex()
    await world.crash(again)


@in_loop
async def test_crash_between_a_failed_stage_and_the_next_attempt_is_gone_on_from(world: World) -> None:
    """Nobody says what follows then: neither a row, nor a gate that waits. And all that had no line yet gets one."""
    running = world.begin()
    await until(world.coordinator.reception.live.is_set)
    undecided = asyncio.Event()

    async def decided(*_: object) -> bool:
        undecided.set()
        await asyncio.Event().wait()
        return False

    world.coordinator.reception.decided = decided  # type: ignore[method-assign]
    await world.until_ready()
    async with asyncio.timeout(20):
        await undecided.wait()
    await world.crash(running)
    world.begin()
    await until(world.coordinator.reception.live.is_set)
    await until(lambda: "round_void" in world.events or "attempt_failed" in world.events)
    assert {"stage_closed", "dropout", "attempt_failed"} <= set(world.events)


LIES = {
    "a setting out of bounds": b'{"batch_size": 64}',
    "a setting that has no bounds": b'{"local_epochs": 5}',
    "an unknown setting": b'{"rows": 1}',
    "no choice at all": b"",
}


@pytest.mark.parametrize("body", LIES.values(), ids=LIES.keys())
@in_loop
async def test_site_that_accepts_the_contract_and_not_its_bounds_is_out(world: World, body: bytes) -> None:
    running = world.begin()
    contract = await world.until_contract()
    world.accept("bank-b", contract, body)
    with pytest.raises(ParticipationError, match="bank-b"):
        await running
    assert "banned" in world.events
    await asyncio.gather(*world.calls, return_exceptions=True)


@in_loop
async def test_what_sites_chose_within_the_bounds_is_known(world: World) -> None:
    running = world.begin()
    contract = await world.until_contract()
    for name in NAMES:
        body = b'{"batch_size":4}' if name == "bank-b" else b"{}"
        world.accept(name, contract, body)
    await until(lambda: "contract_accepted" in world.events)
    assert world.coordinator.choices["bank-b"] == {"batch_size": 4}
    await world.crash(running)
