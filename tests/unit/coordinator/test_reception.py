"""The reception against participants that break off, repeat, flood and lie."""

import asyncio
import datetime
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loops import in_loop
from samples import make_contract, make_proposal
from simulator import make_context

from mpctf_secure.coordinator.audit import RunLog
from mpctf_secure.coordinator.gate import Answer
from mpctf_secure.coordinator.journal import Banned, Finished, Journal
from mpctf_secure.coordinator.reception import Reception
from mpctf_secure.coordinator.spool import Spool
from mpctf_secure.errors import DecodeError, EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.encoding import Reader, enc
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity import ceremony, keystore
from mpctf_secure.ids import IdentityKey, ParticipantName
from mpctf_secure.monitoring.resources import Gpu, Resources
from mpctf_secure.monitoring.usage import Usage
from mpctf_secure.rounds.messages import Fetch, Position, Progress
from mpctf_secure.rounds.state import initial_state
from mpctf_secure.secagg.chunks import digest
from mpctf_secure.secagg.messages import Signed
from mpctf_secure.transport.tls import utc_now

NAMES = ("bank-b", "hospital-a", "telecom-c")
YES = Answer("survivors", b"")
SAMPLE = Resources(0.5, *[1 << 30] * 4, 0, 0, (Gpu(0, "", 1 << 30, 1 << 31, 0.25, None),))


class World:
    """A reception with one upload gate open."""

    def __init__(self, home: Path) -> None:
        folders = {ParticipantName(name): home / name for name in (*NAMES, "coordinator")}
        self.roster = ceremony.hold(folders, ParticipantName("coordinator"), datetime.datetime.now(datetime.UTC), b"x")
        self.keys = {name: keystore.unseal(home / name, b"x").identity for name in (*NAMES, "coordinator")}
        self.peers = {str(member.name): member for member in self.roster.members}
        self.events: list[str] = []
        self.recorded: list[dict[str, object]] = []
        self.context = make_context([self.keys[name] for name in NAMES], dimension=600_000)
        self.ctx = self.context.digest()
        self.folder = home / "spool"
        self.chunks = [bytes([number]) * size for number, size in enumerate(self.context.layout.sizes)]

    def open(self) -> None:
        terms = make_proposal(self.roster, NAMES)
        self.folder.parent.mkdir(exist_ok=True)
        journal = Journal(self.folder.parent)
        log = RunLog(self.folder.parent, self.roster, terms.run_id, utc_now)
        self.reception = Reception(terms, self.roster, self.keys["coordinator"], self.record, journal, log.pieces)
        self.reception.fed.set()
        self.reception.live.set()
        self.reception.run_context = self.ctx
        self.spool = self.reception.spools[self.ctx] = Spool(self.folder, self.context)
        self.gate = self.reception.open("upload", self.ctx, 1, self.context.cohort, self.keep)

    def record(self, kind: str, **fields: object) -> None:
        self.events.append(kind)
        self.recorded.append(fields)

    def keep(self, sender: IdentityKey, message: bytes) -> None:
        with Reader(message) as reader:
            trailer, arrived = reader.bytes(), reader.bytes()
        if Signed.decode(trailer).body != enc(arrived):
            raise SecurityError("upload is not what its digest says")
        self.spool.keep(sender)

    def stream(self, name: str, chunks: list[bytes] | None = None, size: int | None = None) -> list[bytes]:
        sent = self.chunks if chunks is None else chunks
        trailer = Signed.make("upload", self.ctx, self.keys[name], enc(digest(map(sha256, self.chunks)))).encode()
        return [enc(self.ctx, self.context.layout.size if size is None else size, 0), *sent, trailer]

    async def upload(self, name: str, pieces: list[bytes]) -> bytes:
        async def stream() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

        return await self.reception.upload(self.peers[name], stream())

    def label(self, reply: bytes) -> str:
        return Signed.decode(reply).label

    @property
    def files(self) -> list[str]:
        return sorted(path.suffix for path in self.folder.iterdir())


async def until(condition: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + 30  # a disk may be slow
    while asyncio.get_running_loop().time() < deadline:
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to be")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@in_loop
async def test_upload_that_breaks_off_goes_on_where_it_was(world: World) -> None:
    world.open()
    offset = enc("offset", world.ctx, Signed.make("offset", world.ctx, world.keys["bank-b"], b"").encode())
    for cut in range(1, len(world.chunks) + 2):
        assert world.label(await world.upload("bank-b", world.stream("bank-b")[:cut])) == "skip"
        held = Signed.decode(await world.reception.exchange(world.peers["bank-b"], offset)).body
        assert held == enc(min(cut - 1, world.context.layout.vector_chunks))
    assert world.files == [".part"]
    _, *rest = world.stream("bank-b")
    first = world.context.layout.vector_chunks
    rest = [enc(world.ctx, world.context.layout.size, first), *rest[first:]]
    again = asyncio.create_task(world.upload("bank-b", rest))
    await until(lambda: world.gate.arrived)
    held = Signed.decode(await world.reception.exchange(world.peers["bank-b"], offset)).body
    assert held == enc(first)  # a break now, or a restart, does not send it all again
    repeated = asyncio.create_task(world.upload("bank-b", rest))
    await asyncio.sleep(0)
    assert world.files == [".masked"]
    world.gate.answer({}, otherwise=YES)
    assert world.label(await again) == world.label(await repeated) == "survivors"
    assert world.reception.banned == {}


@in_loop
async def test_upload_that_a_power_cut_spoilt_begins_again_and_nobody_is_blamed(world: World) -> None:
    world.open()
    await world.upload("bank-b", world.stream("bank-b")[:2])
    (path,) = world.folder.iterdir()
    path.write_bytes(bytes(path.stat().st_size - 1) + b"\1")
    opening, _, *rest = world.stream("bank-b")
    resumed = [enc(world.ctx, world.context.layout.size, 1), *rest]
    assert world.label(await world.upload("bank-b", resumed)) == "again"
    assert world.files == []
    whole = asyncio.create_task(world.upload("bank-b", [opening, *world.stream("bank-b")[1:]]))
    await until(lambda: world.gate.arrived)
    world.gate.answer({}, otherwise=YES)
    assert world.label(await whole) == "survivors"
    assert world.reception.banned == {}


@in_loop
async def test_upload_that_is_here_and_in_no_journal_goes_on_at_its_end(world: World) -> None:
    """A crash between the two: the site is told that all is held, and sends what is left."""
    world.open()
    first = asyncio.create_task(world.upload("bank-b", world.stream("bank-b")))
    await until(lambda: world.gate.arrived)
    first.cancel()
    world.reception._journal._db.execute("DELETE FROM entry")
    world.gate = world.reception.open("upload", world.ctx, 1, world.context.cohort, world.keep)
    held = world.spool.held(world.peers["bank-b"].identity)
    rest = [enc(world.ctx, world.context.layout.size, held), *world.stream("bank-b")[1 + held :]]
    again = asyncio.create_task(world.upload("bank-b", rest))
    await until(lambda: world.gate.arrived)
    world.gate.answer({}, otherwise=YES)
    assert world.label(await again) == "survivors"


@in_loop
async def test_chunk_that_comes_again_does_not_hold_up_the_round(world: World) -> None:
    world.open()
    seen = []
    for cut in (2, 2, 2, 3):
        await world.upload("bank-b", world.stream("bank-b")[:cut])
        seen.append(world.spool._moved)
    assert seen[0] == seen[1] == seen[2] < seen[3]


@in_loop
async def test_sender_that_is_turned_away_again_and_again_is_told_a_few_times(world: World) -> None:
    world.open()
    for _ in range(100):
        world.reception.turned_away("ipv4:192.0.2.7", "nobody in the roster")
    assert world.events == ["refused"] * 10


@in_loop
async def test_upload_that_begins_after_what_is_held_is_refused(world: World) -> None:
    world.open()
    with pytest.raises(SecurityError, match="begins at 1"):
        await world.upload("bank-b", [enc(world.ctx, world.context.layout.size, 1), *world.stream("bank-b")[2:]])


@in_loop
async def test_repeated_uploads_leave_one_file(world: World) -> None:
    world.open()
    tasks = []
    for _ in range(5):
        tasks.append(asyncio.create_task(world.upload("bank-b", world.stream("bank-b"))))
    await until(lambda: all(task.done() for task in tasks[:-1]) and world.files == [".masked"])
    world.gate.answer({}, otherwise=YES)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert world.label(await world.upload("bank-b", world.stream("bank-b"))) == "survivors"
    assert world.files == [".masked"]


WRONG_STREAMS = {
    "a chunk of another size": lambda w: [b"x" * 7],
    "other bytes than the signed digest": lambda w: [b"\1" * len(w.chunks[0]), *w.chunks[1:]],
    "chunks in another order": lambda w: [w.chunks[1], w.chunks[0], *w.chunks[2:]],
    "a chunk twice in the place of another": lambda w: [w.chunks[0], w.chunks[0], *w.chunks[2:]],
    "a chunk too many": lambda w: [w.chunks[0], *w.chunks],
    "more after the digest": lambda w: [*w.chunks, Signed.make("upload", w.ctx, w.keys["bank-b"], b"").encode()],
}


@pytest.mark.parametrize("spoil", WRONG_STREAMS.values(), ids=WRONG_STREAMS.keys())
@in_loop
async def test_wrong_upload_is_refused_its_sender_is_out_and_nothing_stays_on_disk(world: World, spoil) -> None:
    world.open()
    with pytest.raises(SecurityError):
        await world.upload("bank-b", world.stream("bank-b", spoil(world)))
    assert world.files == []
    assert [*world.reception.banned] == [world.peers["bank-b"].identity]
    assert world.peers["bank-b"].identity not in world.gate.awaited
    hello = Signed.make("hello", world.roster.hash, world.keys["bank-b"], b"").encode()
    with pytest.raises(SecurityError, match="out of this run"):
        await world.reception.exchange(world.peers["bank-b"], enc("hello", world.roster.hash, hello))


@in_loop
async def test_upload_that_announces_another_length_is_refused_before_its_first_byte(world: World) -> None:
    world.open()
    with pytest.raises(SecurityError, match="announces 5 bytes"):
        await world.upload("bank-b", world.stream("bank-b", [], size=5))
    assert world.files == []


@in_loop
async def test_upload_without_an_opening_is_refused(world: World) -> None:
    world.open()
    with pytest.raises(SecurityError):
        await world.upload("bank-b", [world.ctx])


@in_loop
async def test_stalled_stream_ends_with_its_stage_and_leaves_nothing(world: World) -> None:
    world.open()

    async def stalls() -> AsyncIterator[bytes]:
        for piece in world.stream("bank-b")[:2]:
            yield piece
        await asyncio.Event().wait()

    upload = asyncio.create_task(world.reception.upload(world.peers["bank-b"], stalls()))
    await until(lambda: world.files == [".part"])
    await world.gate.collect(0.01, 3)
    world.gate.answer({})
    assert world.label(await upload) == "skip"
    world.reception.clear_attempt(world.ctx)
    assert not world.folder.exists()


@in_loop
async def test_message_of_another_organisation_is_refused(world: World) -> None:
    world.open()
    hello = Signed.make("hello", world.roster.hash, world.keys["hospital-a"], b"").encode()
    with pytest.raises(SecurityError, match="not signed by who sent it"):
        await world.reception.exchange(world.peers["bank-b"], enc("hello", world.roster.hash, hello))
    assert world.reception.banned == {}


@in_loop
async def test_flood_of_progress_makes_few_events(world: World) -> None:
    world.open()
    for step in range(300):
        body = Progress(1, step // 15).encode()
        message = Signed.make("progress", world.ctx, world.keys["bank-b"], body).encode()
        await world.reception.exchange(world.peers["bank-b"], enc("progress", world.ctx, message))
    assert 0 < world.events.count("progress") < 10


@in_loop
async def test_flood_of_resources_makes_one_event_of_each_node(world: World) -> None:
    world.open()
    usage = Usage({1: SAMPLE, 7: replace(SAMPLE, cpu=1.0)})
    for body in [usage.encode()] * 300:
        message = Signed.make("resources", world.ctx, world.keys["bank-b"], body).encode()
        reply = await world.reception.exchange(world.peers["bank-b"], enc("resources", world.ctx, message))
        assert world.label(reply) == "noted"
    assert world.events == ["resources"] * 2
    assert world.recorded == [
        {"participant": "bank-b", "node": 1, **asdict(SAMPLE)},
        {"participant": "bank-b", "node": 7, **asdict(SAMPLE), "cpu": 1.0},
    ]
    message = Signed.make("resources", world.ctx, world.keys["bank-b"], b"spoilt").encode()
    with pytest.raises(DecodeError):
        await world.reception.exchange(world.peers["bank-b"], enc("resources", world.ctx, message))
    assert world.reception.banned == world.reception.lost == {}


@in_loop
async def test_who_has_heard_of_the_end_is_waited_for_no_longer(world: World) -> None:
    world.open()
    assert world.reception.listening() == set()  # nobody has ever come
    hello = {name: Signed.make("hello", world.roster.hash, world.keys[name], b"").encode() for name in NAMES[:2]}
    for name, message in hello.items():
        await world.reception.exchange(world.peers[name], enc("hello", world.roster.hash, message))
    there = {world.peers[name].identity for name in NAMES[:2]}
    assert world.reception.listening() == there
    world.reception.end("enough")
    await world.reception.exchange(world.peers["bank-b"], enc("hello", world.roster.hash, hello["bank-b"]))
    assert world.reception.listening() == there  # it was told of the run, not of its end
    for name in NAMES[:2]:
        alive = Signed.make("alive", world.ctx, world.keys[name], b"").encode()
        await world.reception.exchange(world.peers[name], enc("alive", world.ctx, alive))
    assert world.reception.listening() == set()


@in_loop
async def test_end_of_the_run_reaches_who_waits_and_who_comes_later(world: World) -> None:
    world.open()
    waiting = asyncio.create_task(world.upload("bank-b", world.stream("bank-b")))
    await until(lambda: world.gate.arrived)
    world.reception.end("enough")
    assert world.label(await waiting) == "abort"
    late = Signed.make("ready", world.ctx, world.keys["bank-b"], b"").encode()
    assert world.label(await world.reception.exchange(world.peers["bank-b"], enc("ready", world.ctx, late))) == "abort"


@in_loop
async def test_site_with_another_roster_is_told_so_and_may_come_back(world: World) -> None:
    world.open()
    for ctx, why in ((bytes(32), "bank-b has another roster than version 1"), (world.roster.hash, None)):
        hello = enc("hello", ctx, Signed.make("hello", ctx, world.keys["bank-b"], b"").encode())
        if why:
            world.reception.run_context = None
            with pytest.raises(SecurityError, match=why):
                await world.reception.exchange(world.peers["bank-b"], hello)
            world.reception.run_context = world.ctx  # who is in the run has the run's roster too
            assert world.label(await world.reception.exchange(world.peers["bank-b"], hello)) == "proposal"
        else:
            assert world.label(await world.reception.exchange(world.peers["bank-b"], hello)) == "proposal"


@in_loop
async def test_state_for_one_who_was_away_goes_on_where_it_broke_off(world: World) -> None:
    world.open()
    world.reception.archive.finished = [Finished(number, bytes([number]), b"signed", {}) for number in (1, 2, 3)]
    first = initial_state(make_contract())
    world.reception.archive.state = replace(first, round=3, adapter=np.zeros((1 << 19) + 5, np.float32))

    async def pieces(held: int) -> list[bytes]:
        fetch = Fetch(Position(1, bytes(32)), held=held)
        message = Signed.make("behind", world.ctx, world.keys["bank-b"], fetch.encode()).encode()
        return [piece async for piece in world.reception.download(world.peers["bank-b"], message)]

    header, *whole = await pieces(0)
    assert whole[:2] == [b"\2", b"\3"]
    assert b"".join(whole[2:]) == bytes(4 * ((1 << 19) + 5))
    assert len(whole) == 5
    for held in (*range(1, 7), 1 << 62):
        assert await pieces(held) == [header, *whole[held:]]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from(["exchange", "upload", "download"]))
@in_loop
async def test_any_bytes_are_refused_or_answered_and_told_a_few_times(world: World, noise: bytes, method: str) -> None:
    world.open() if not world.folder.exists() else None
    peer = world.peers["bank-b"]
    calls = {
        "exchange": lambda: world.reception.exchange(peer, noise),
        "upload": lambda: world.upload("bank-b", [noise]),
        "download": lambda: anext(world.reception.download(peer, noise)),
    }
    with pytest.raises(SecurityError):
        await calls[method]()
    assert world.reception.banned == {}
    assert world.events.count("refused") <= 10


@in_loop
async def test_message_that_the_journal_has_no_room_for_ends_the_collecting(world: World, monkeypatch) -> None:
    """Its effect on the state is there, and would not be after a restart."""

    def full(*_: object) -> None:
        raise EnvironmentUnfitError("run.sqlite: database or disk is full")

    world.open()
    collecting = asyncio.create_task(world.gate.collect(60, 1))
    monkeypatch.setattr(Journal, "add", full)
    with pytest.raises(EnvironmentUnfitError):
        await world.upload("bank-b", world.stream("bank-b"))
    with pytest.raises(EnvironmentUnfitError):
        await collecting
    with pytest.raises(EnvironmentUnfitError):
        world.reception.open("release", world.ctx, 1, world.context.cohort, lambda *_: None)


@in_loop
async def test_member_removed_while_the_coordinator_was_down_is_out_before_anything_is_decided(world: World) -> None:
    """Its journaled message is fed first: the ban takes its place behind it, in the journal too."""
    world.open()
    reception, member = world.reception, world.peers["bank-b"].identity
    reception.live.clear()
    reception.fed.clear()
    gate = reception.open("ready", world.ctx, 1, world.context.cohort, lambda *_: None)
    gate.take(member, b"m")
    collecting = asyncio.create_task(gate.collect(60, 3))
    reception.look = lambda: reception.ban(member, "not in roster version 2")
    await reception.replay(lambda: False)
    await collecting
    assert (gate.arrived, gate.left) == ([], {member: "not in roster version 2"})
    assert Banned(member, "not in roster version 2") in list(reception._journal.rows())
