"""An organisation's own log from one log key to the next."""

import datetime
import multiprocessing
from pathlib import Path

import pytest

from mpctf_secure.auditlog import own as own_logs
from mpctf_secure.auditlog.own import OwnLog, folder_of, verified
from mpctf_secure.auditlog.own_events import Cosigned, KeysOpened, LogBegun
from mpctf_secure.auditlog.storage import LOG
from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.signature import SigningKey

FIRST, SECOND = SigningKey(b"1" * 32), SigningKey(b"2" * 32)
Z = "00" * 32


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def opened(keys: Path, key: SigningKey = FIRST) -> OwnLog:
    return OwnLog(keys, "hospital-a", bytes(32), key.public, now)


def cosigned(step: int, run: str = "joint") -> Cosigned:
    return Cosigned(run=run, round=step, size=step + 3, root=Z, head=Z, salt=Z, own_size=1)


def test_log_goes_on_and_a_new_key_begins_another_that_names_it(tmp_path: Path) -> None:
    opened(tmp_path).append(KeysOpened(command="join"))
    log = opened(tmp_path)
    log.append(KeysOpened(command="join"))
    log.sign(FIRST)
    before = log.history.tree
    opened(tmp_path, SECOND).append(KeysOpened(command="join"))
    first, second = verified(tmp_path)
    assert (len(first.history.tree), first.signed) == (3, 3)
    assert (len(second.history.tree), second.signed) == (2, 0)
    begun = second.history.find("log_begun")
    assert begun
    assert begun.event == LogBegun(
        organisation="hospital-a", identity=Z, previous=first.key.name, size=3, root=before.root().hex()
    )
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "audit").rglob("*")} == {0}


def test_last_cosigned_checkpoint_of_a_run_is_known(tmp_path: Path) -> None:
    log = opened(tmp_path)
    assert log.cosigned("joint", 9) is None
    for step in (0, 1, 2):
        log.append(cosigned(step))
    log.append(cosigned(5, "other"))
    assert opened(tmp_path).cosigned("joint", 9) == cosigned(2)
    assert opened(tmp_path).cosigned("joint", 1) == cosigned(1)


def test_keys_folder_without_a_log_has_none(tmp_path: Path) -> None:
    assert verified(tmp_path) == []


def test_older_log_that_was_cut_off_or_lost_is_found(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.append(KeysOpened(command="join"))  # not signed: only the next log knows of it
    opened(tmp_path, SECOND)
    folder = folder_of(tmp_path, verified(tmp_path)[0].key)
    content = (folder / LOG).read_bytes()
    (folder / LOG).write_bytes(content.splitlines(keepends=True)[0])
    with pytest.raises(SecurityError, match="not the log from which the next one goes on"):
        verified(tmp_path)
    (folder / LOG).write_bytes(content.replace(b"join", b"sign"))
    with pytest.raises(SecurityError, match="not the log from which the next one goes on"):
        verified(tmp_path)
    (folder / "key").unlink()
    with pytest.raises(EnvironmentUnfitError, match="key"):
        verified(tmp_path)


@pytest.mark.parametrize("call", ["append", "create", "replace"])
def test_crash_while_a_log_begins_leaves_one_that_can_be_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """What is not yet named in `current` is as if it had never been."""
    with monkeypatch.context() as patch:

        def dies(*_: object) -> None:
            raise KeyboardInterrupt

        where = {"append": (own_logs.Log, "append"), "create": (own_logs.files, "replace")}
        target, name = where.get(call, (own_logs.files, "replace"))
        if call == "replace":
            original, calls = own_logs.files.replace, iter(range(9))
            patch.setattr(target, name, lambda *a: dies() if next(calls) else original(*a))
        else:
            patch.setattr(target, name, dies)
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path)
    opened(tmp_path).append(KeysOpened(command="join"))
    assert [len(one.history.tree) for one in verified(tmp_path)] == [2]


def begin(keys: Path) -> None:
    opened(keys).append(KeysOpened(command="join"))


def test_two_processes_begin_one_log(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=begin, args=(tmp_path,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    (log,) = verified(tmp_path)
    assert len(log.history.tree) == 4
    assert len(list((tmp_path / "audit").glob("*/log.jsonl"))) == 1
