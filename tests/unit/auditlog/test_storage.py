"""A log on disk against crashes, full disks, other processes, and whoever edits it."""

import datetime
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpctf_secure.auditlog.entry import Entry
from mpctf_secure.auditlog.events import ContractClosed, Leaf, LogRecovered, RunOpened, Vetoed
from mpctf_secure.auditlog.history import History, HistoryOfRun
from mpctf_secure.auditlog.note import Checkpoint, Key, Note
from mpctf_secure.auditlog.own_events import KeysOpened, LogBegun, RunAccepted
from mpctf_secure.auditlog.storage import (
    CHECKPOINT,
    LOG,
    Copy,
    Log,
    keep_beside,
    keep_witnessed,
    read_record,
    read_signed,
    take_all,
)
from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.signature import SigningKey

WRITER, THIEF = SigningKey(b"w" * 32), SigningKey(b"t" * 32)
KEY = Key("hospital-a/own/1", WRITER.public)
BEGAN = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
BEGUN = LogBegun(organisation="hospital-a", identity="00" * 32, previous=None, size=0, root=None)


class Clock:
    """A second later at each look."""

    def __init__(self) -> None:
        self.now = BEGAN

    def __call__(self) -> datetime.datetime:
        self.now += datetime.timedelta(seconds=1)
        return self.now


def opened(folder: Path, clock: Callable[[], datetime.datetime] | None = None) -> Log[History]:
    return Log(folder, KEY, History(), clock or Clock())


def said(number: int) -> Leaf:
    return KeysOpened(command=f"command-{number}")


def begun(folder: Path, leaves: int = 3) -> Log[History]:
    """A log of some leaves, all of them signed."""
    log = opened(folder)
    log.append(BEGUN)
    for number in range(1, leaves):
        log.append(said(number))
    log.sign(WRITER)
    return log


def commands(folder: Path) -> list[str]:
    entries = [Entry.decode(line, History.kinds).event for line in read_record(folder).lines]
    return [entry.command if isinstance(entry, KeysOpened) else entry.kind for entry in entries]


def test_log_goes_on_where_it_was(tmp_path: Path) -> None:
    log = begun(tmp_path)
    log.append(said(3))
    again = opened(tmp_path, lambda: BEGAN + datetime.timedelta(days=1))
    assert (len(again.history.tree), again.history.tree.root()) == (4, log.history.tree.root())
    again.append(said(4))
    log.append(said(5))  # it reads first what the other has added
    assert commands(tmp_path) == ["log_begun", *(f"command-{n}" for n in (1, 2, 3, 4)), "clock_set", "command-5"]
    assert read_signed(tmp_path, KEY, History())[1] == 3
    assert (tmp_path / LOG).stat().st_mode & 0o777 == 0o600
    assert log.leaves(1, 3) == read_record(tmp_path).lines[1:3]


def test_event_with_a_key_is_there_once_and_never_otherwise(tmp_path: Path) -> None:
    log = begun(tmp_path)
    accepted = RunAccepted(run="joint", roster_hash="00" * 32, contract_hash="11" * 32, policy="00" * 32)
    first = log.append(accepted)
    assert log.append(accepted) == first
    with pytest.raises(EnvironmentUnfitError, match="told otherwise before"):
        log.append(accepted.model_copy(update={"contract_hash": "22" * 32}))
    assert commands(tmp_path)[3:] == ["run_accepted"]


def test_checkpoint_of_a_step_is_signed_once(tmp_path: Path) -> None:
    """Else a crash between the signature and its file would leave two, which would convict an honest coordinator."""
    log = begun(tmp_path)
    note = log.sign(WRITER, "step 1")
    log.append(said(3))
    assert log.sign(WRITER, "step 1") == note
    assert Checkpoint.decode(log.sign(WRITER, "step 2").text).size == 4
    assert Checkpoint.decode(log.sign(WRITER).text).size == 4


def test_clock_that_goes_back_is_told_of(tmp_path: Path) -> None:
    clock = Clock()
    log = opened(tmp_path, clock)
    log.append(BEGUN)
    clock.now -= datetime.timedelta(hours=1)
    log.append(said(1))
    assert commands(tmp_path) == ["log_begun", "clock_set", "command-1"]
    read_signed(tmp_path, KEY, History())


def dies(deed: Callable[[], object], kill: Callable[[], None]) -> None:
    """Do it in a child that is killed."""
    child = os.fork()
    if child == 0:
        kill()
        deed()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), os.waitstatus_to_exitcode(status)


def test_kill_at_every_byte_of_an_append_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    original, whole = os.pwrite, tmp_path / "whole"
    begun(whole)
    before = (whole / LOG).read_bytes()
    opened(whole, lambda: BEGAN + datetime.timedelta(days=1)).append(said(3))
    line = (whole / LOG).read_bytes()[len(before) :]
    for cut in range(len(line) + 1):
        folder = tmp_path / str(cut)
        begun(folder)

        def kill(cut: int = cut) -> None:
            def torn(descriptor: int, content: bytes, at: int) -> int:
                original(descriptor, content[:cut], at)
                os.kill(os.getpid(), signal.SIGKILL)
                return 0

            os.pwrite = torn

        dies(lambda folder=folder: opened(folder, lambda: BEGAN + datetime.timedelta(days=1)).append(said(3)), kill)
        opened(folder, lambda: BEGAN + datetime.timedelta(days=2)).append(said(4))
        lost = [] if cut in {0, len(line)} else ["log_recovered"]
        kept = ["command-3"] if cut == len(line) else []
        assert commands(folder)[3:] == [*kept, *lost, "command-4"]
        assert read_signed(folder, KEY, History())[1] == 3
        if lost:
            (recovered,) = [Entry.decode(one, History.kinds).event for one in read_record(folder).lines[3:4]]
            assert recovered == LogRecovered(dropped=cut)


def test_kill_before_any_call_of_a_checkpoint_leaves_the_old_one_or_the_new(tmp_path: Path) -> None:
    calls = 0

    def killing(at: int) -> Callable[[], None]:
        def patch() -> None:
            count = iter(range(1000))

            def wrapped(original: Callable[..., object]) -> Callable[..., object]:
                def call(*arguments: object, **named: object) -> object:
                    if next(count) == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*arguments, **named)

                return call

            os.fsync, os.open = wrapped(os.fsync), wrapped(os.open)
            Path.rename = wrapped(Path.rename)  # type: ignore[method-assign, assignment]

        return patch

    sizes = set()
    for at in range(100):
        folder = tmp_path / str(at)
        log = begun(folder)
        log.append(said(3))
        try:
            dies(lambda log=log: log.sign(WRITER), killing(at))
        except AssertionError:
            break  # it came through: there is no further call
        calls += 1
        sizes.add(read_signed(folder, KEY, History())[1])
        opened(folder, lambda: BEGAN + datetime.timedelta(days=1)).sign(WRITER)
        assert read_signed(folder, KEY, History())[1] == 4
    assert calls >= 6
    assert sizes == {3, 4}


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_full_disk_is_named_and_leaves_the_log_as_it_was(tmp_path: Path, full_disk: Callable[[int], None]) -> None:
    log = begun(tmp_path)
    size = (tmp_path / LOG).stat().st_size
    for room in (0, 1, 40):
        full_disk(size + room)
        with pytest.raises(EnvironmentUnfitError, match=r"log\.jsonl: (No space left|File too large)"):
            log.append(said(3))
        assert (tmp_path / LOG).stat().st_size == size
    full_disk(1 << 20)
    log.append(said(4))
    assert commands(tmp_path)[3:] == ["command-4"]


def test_failing_disk_leaves_nothing_that_was_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = begun(tmp_path)

    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(EnvironmentUnfitError, match="Input/output error"):
            log.append(said(3))
    log.append(said(4))
    assert commands(tmp_path)[3:] == ["command-4"]


def edit(line: int, old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        lines = (folder / LOG).read_bytes().split(b"\n")
        assert old in lines[line]
        lines[line] = lines[line].replace(old, new)
        (folder / LOG).write_bytes(b"\n".join(lines))

    return change


def reorder(folder: Path) -> None:
    """The commands change places, and the times stay."""
    edit(1, b"command-1", b"command-2")(folder)
    edit(2, b"command-2", b"command-1")(folder)


def keep_lines(count: int) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        lines = (folder / LOG).read_bytes().splitlines(keepends=True)
        (folder / LOG).write_bytes(b"".join(lines[:count]))

    return cut


def sign_by_thief(folder: Path) -> None:
    edit(1, b"command-1", b"command-7")(folder)
    stolen = Log(folder / "other", Key(KEY.name, THIEF.public), History(), Clock())
    stolen.append(BEGUN)
    (folder / CHECKPOINT).write_bytes(stolen.sign(THIEF).encode())
    shutil.rmtree(folder / "other")


def checkpoint_of_another_log(folder: Path) -> None:
    other = Log(folder / "other", Key("hospital-a/own/2", WRITER.public), History(), Clock())
    other.append(BEGUN)
    (folder / CHECKPOINT).write_bytes(other.sign(WRITER).encode())
    shutil.rmtree(folder / "other")


DAMAGE = {
    "a leaf is edited": (edit(1, b"command-1", b"command-7"), "was changed"),
    "a leaf is edited so that it is none": (edit(1, b'"kind"', b'"kin"'), "cut off|leaf 1"),
    "leaves are reordered": (reorder, "was changed"),
    "a leaf is dropped at the end": (keep_lines(2), "cut off"),
    "all leaves are dropped": (keep_lines(0), "cut off"),
    "the last line has lost its end": (
        lambda folder: os.truncate(folder / LOG, (folder / LOG).stat().st_size - 1),
        "cut off",
    ),
    "a leaf is put in": (
        edit(
            1,
            b'{"command":"command-1"',
            b'{"command":"x","kind":"keys_opened","time":"2030-01-01T00:00:01.000Z"}\n{"command":"command-1"',
        ),
        "was changed",
    ),
    "it is signed by a thief": (sign_by_thief, "not signed by|signature"),
    "the checkpoint is another log's": (checkpoint_of_another_log, "not signed by|checkpoint of"),
    "the checkpoint tells of another log": (
        lambda folder: (folder / CHECKPOINT).write_bytes(
            Note(Checkpoint("hospital-a/own/2", 1, bytes(32)).encode()).signed(KEY.name, WRITER).encode()
        ),
        "checkpoint of hospital-a/own/2, not of",
    ),
    "the checkpoint is none": (lambda folder: (folder / CHECKPOINT).write_bytes(b"no"), "not a signed note"),
}


@pytest.mark.parametrize(("change", "why"), DAMAGE.values(), ids=DAMAGE.keys())
def test_log_that_is_not_what_was_signed_is_refused_and_left_as_it_is(
    tmp_path: Path, change: Callable[[Path], None], why: str
) -> None:
    folder = tmp_path / "log"
    begun(folder)
    change(folder)
    before = (folder / LOG).read_bytes()
    for use in (lambda: opened(folder), lambda: read_signed(folder, KEY, History())):
        with pytest.raises(SecurityError, match=why) as caught:
            use()
        assert str(folder) in caught.value.message
    assert (folder / LOG).read_bytes() == before


TORN = {"zeros": b"\0" * 300, "half a line": b'{"command":', "a line with a hole": b'{"comm\0\0\0"}\n'}


@pytest.mark.parametrize("rest", TORN.values(), ids=TORN.keys())
def test_what_a_power_cut_has_left_behind_the_leaves_is_dropped_and_told_of(tmp_path: Path, rest: bytes) -> None:
    begun(tmp_path)
    with (tmp_path / LOG).open("ab") as stream:
        stream.write(rest)
    opened(tmp_path, lambda: BEGAN + datetime.timedelta(days=1))
    assert commands(tmp_path)[3:] == ["log_recovered"]
    read_signed(tmp_path, KEY, History())


WHOLE = {
    "no leaf": b"hello\n",
    "a leaf of a later version": b'{"kind":"invented_later","time":"2031-01-01T00:00:00.000Z"}\n',
    "a leaf behind half a line": b'{"comm\n{"command":"x","kind":"keys_opened","time":"2031-01-01T00:00:00.000Z"}\n',
    "a leaf behind zeros": b'\0\0\n{"command":"x","kind":"keys_opened","time":"2031-01-01T00:00:00.000Z"}\n',
}


@pytest.mark.parametrize("rest", WHOLE.values(), ids=WHOLE.keys())
def test_what_was_written_so_is_not_dropped(tmp_path: Path, rest: bytes) -> None:
    """Not by an older version of the program, nor because one leaf was edited."""
    begun(tmp_path)
    with (tmp_path / LOG).open("ab") as stream:
        stream.write(rest)
    content = (tmp_path / LOG).read_bytes()
    with pytest.raises(SecurityError, match="leaf 3"):
        opened(tmp_path)
    assert (tmp_path / LOG).read_bytes() == content


def test_power_cut_in_the_first_leaf_of_all_leaves_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b'{"kind":"log_b')
    opened(tmp_path).append(BEGUN)
    assert commands(tmp_path) == ["log_begun"]


def test_log_that_gets_shorter_under_a_process_is_refused(tmp_path: Path) -> None:
    """As when a backup is put back beside it."""
    log = begun(tmp_path)
    log.append(said(3))
    keep_lines(3)(tmp_path)
    with pytest.raises(SecurityError, match="shorter"):
        log.append(said(4))
    assert commands(tmp_path)[3:] == []


def append_many(folder: Path, name: str) -> None:
    log = Log(folder, KEY, History(), lambda: datetime.datetime.now(datetime.UTC))
    for number in range(20):
        log.append(KeysOpened(command=f"{name}-{number}"))
        log.sign(WRITER)


def test_two_processes_write_one_log_one_after_the_other(tmp_path: Path) -> None:
    begun(tmp_path)
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=append_many, args=(tmp_path, name)) for name in ("a", "b")]
    for child in children:
        child.start()
    for child in children:
        child.join()
    found = commands(tmp_path)
    assert {name for name in found if name.startswith(("a-", "b-"))} == {f"{n}-{i}" for n in "ab" for i in range(20)}
    assert read_signed(tmp_path, KEY, History())[1] == len(found)


OPENED = RunOpened(run="joint", roster_version=1, roster_hash="00" * 32, package="00" * 32, participants=())
TOLD = [OPENED, Vetoed(participant="a"), ContractClosed(contract_hash="00" * 32, base_model_hash="00" * 32)]
LINES = [Entry(event, BEGAN + datetime.timedelta(seconds=n)).encode() for n, event in enumerate(TOLD)]


def test_no_other_key_spoils_a_log_with_its_signature(tmp_path: Path) -> None:
    """A coordinator that has rotated its keys goes on with a run that began with the old ones."""
    log = begun(tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(EnvironmentUnfitError, match="signed with another key"):
        log.sign(SigningKey(b"9" * 32))
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_copy_takes_what_can_come_next_and_keeps_it(tmp_path: Path) -> None:
    copy = Copy(tmp_path, HistoryOfRun)
    with pytest.raises(SecurityError, match="begins with veto"):
        take_all(LINES[1:], copy.history.copy())
    assert len(copy.history.tree) == 0
    copy.extend(take_all(LINES[:2], copy.history.copy()), LINES[:2])
    again = Copy(tmp_path, HistoryOfRun)
    assert again.history.tree.root() == copy.history.tree.root()
    again.extend(take_all(LINES[2:], again.history.copy()), LINES[2:])
    assert read_record(tmp_path).lines == LINES


def test_spoilt_copy_is_got_again(tmp_path: Path) -> None:
    """It is a cache: what this site has cosigned is in its own log."""
    copy = Copy(tmp_path, HistoryOfRun)
    copy.extend(take_all(LINES, copy.history.copy()), LINES)
    (tmp_path / LOG).write_bytes((tmp_path / LOG).read_bytes()[:-7] + b"spoilt\n")
    again = Copy(tmp_path, HistoryOfRun)
    assert len(again.history.tree) == 2
    again.forget()
    again.extend(take_all(LINES, again.history.copy()), LINES)
    assert read_record(tmp_path).lines == LINES


def test_folder_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match=r"no log\.jsonl here"):
        read_record(tmp_path)


def test_copy_that_is_no_log_begins_again(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b"no\nlog\n")
    copy = Copy(tmp_path, HistoryOfRun)
    copy.extend(take_all(LINES, copy.history.copy()), LINES)
    assert read_record(tmp_path).lines == LINES


def test_what_lies_beside_a_log_is_kept_once_and_the_newest_witnessed_checkpoint(tmp_path: Path) -> None:
    log = begun(tmp_path)
    keep_beside(tmp_path, b"", {"1.json": b"roster"})
    keep_beside(tmp_path, b"contract", {"1.json": b"another"})
    old, new = log.sign(WRITER, "1"), log.sign(WRITER, "2")
    log.append(said(3))
    newest = log.sign(WRITER, "3")
    for note in (old, newest, new):
        keep_witnessed(tmp_path, note)
    record = read_record(tmp_path)
    assert (record.contract, record.rosters, record.notes["witnessed"]) == (b"contract", [b"roster"], newest.encode())
