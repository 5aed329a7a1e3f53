"""What `audit verify` finds, for people and programs: a record for each log, of statements and of doubts."""

import contextlib
import datetime
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from mpctf_secure import files
from mpctf_secure.auditlog import own as own_logs
from mpctf_secure.auditlog.events import Charged, Cosigned, Pruned
from mpctf_secure.auditlog.history import History, HistoryOfRun
from mpctf_secure.auditlog.note import Key
from mpctf_secure.auditlog.own import OwnRecord
from mpctf_secure.auditlog.storage import FOLDER, LOG, Record, read_record
from mpctf_secure.cli.join import load_site
from mpctf_secure.errors import DecodeError, SecurityError, UsageError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity import keystore
from mpctf_secure.identity.documents import SignedRoster
from mpctf_secure.privacy.ledger import Ledger
from mpctf_secure.rounds.audit import (
    Fork,
    Verdict,
    contradicts,
    find_fork,
    missing,
    reconcile,
    run_log_key,
    unwitnessed,
    verify_run,
)


class _Seen(NamedTuple):
    """A run's log that was verified."""

    path: Path
    record: Record
    verdict: Verdict
    history: HistoryOfRun


def of_logs(paths: Sequence[Path], roster: Path | None) -> list[dict[str, Any]]:
    """Audit folders of runs, files of evidence; folders of one run are held against each other."""
    records, seen = [], list[_Seen]()
    for path in paths:
        if path.is_file():
            records.append(_of_fork(path, roster))
            continue
        if (path / own_logs.KEY).is_file():
            records.append(_of_own(path, roster))
            continue
        if not (path / LOG).is_file():
            raise UsageError(f"{path}: no {LOG} here", hint="name the audit folder of a run, or of a site's copy of it")
        with _naming(path):
            record = read_record(path)
            one = _Seen(path, record, *verify_run(record))
            if roster and keystore.load_document(roster, SignedRoster).roster.hash != one.verdict.roster.hash:
                raise SecurityError(f"its roster is another one than {roster}")
        statements = _statements(one.verdict, record, compared=roster is not None)
        doubts = missing(one.verdict, one.history, record)
        for other in seen:
            if other.verdict.origin == one.verdict.origin:
                found = _compare(one, other)
                (doubts if found else statements).append(found or _longer(one, other))
        seen.append(one)
        records.append(_record(f"{path}: {one.verdict.origin}", statements, doubts))
    return records


def _compare(one: _Seen, other: _Seen) -> str | None:
    """What is wrong between two logs of one run, and a file of evidence where two checkpoints are enough for that."""
    size = contradicts(one.record, other.history) or contradicts(other.record, one.history)
    if size is None:
        return None
    key = run_log_key(one.verdict.roster, one.verdict.origin.rpartition("/")[2])
    fork = find_fork(one.record, other.record, key)
    if fork is None:
        return f"{other.path} has another history: its first {size} leaves, which were signed, are others"
    evidence = Path(f"fork-{sha256(fork.encode()).hex()[:8]}.json")
    with files.writing(evidence):
        files.replace(evidence, fork.encode())
    return f"{other.path} has another history: {evidence} convicts {one.verdict.roster.coordinator.name}"


def _longer(one: _Seen, other: _Seen) -> str:
    more = one.verdict.leaves - other.verdict.leaves
    length = f"; it has {abs(more)} leaves {'more' if more > 0 else 'less'}" if more else ""
    return f"no checkpoint contradicts one of {other.path}{length}"


def of_site(site_file: Path, run: str | None = None, given: Path | None = None) -> list[dict[str, Any]]:
    """A site's own logs, and the copies of all runs' logs, or of one, against them."""
    site = load_site(site_file)
    name, records, logs = keystore.organisation(site.keys).name, [], own_logs.verified(site.keys)
    copies = sorted((site.work / "runs").glob(f"*/{FOLDER}"))
    if not logs and copies:
        raise SecurityError(f"{site.keys}: the own log is gone", hint="restore the keys folder as it was")
    if not logs:
        raise UsageError(f"{site.keys}: no own log yet", hint="it begins with enroll init, or the first join")
    rosters = keystore.all_rosters(site.keys)
    known = {member.log for roster in rosters for member in roster.members if member.name == name}
    for log in logs:
        # Before the first roster nobody else can know the key.
        doubts = [] if log.key.public in known or not rosters else ["no installed roster has its key"]
        records.append(_record(log.key.name, [_length(log)], doubts + _ledger_doubts(site.keys, log.history)))
    hashes = {keystore.load_document(given, SignedRoster).roster.hash} if given else {one.hash for one in rosters}
    histories = [log.history for log in logs]
    for folder in copies:
        if run in {None, folder.parent.name} and (folder / LOG).is_file():
            records.append(_of_copy(folder, name, hashes, histories))
    there = {folder.parent.name for folder in copies if (folder / LOG).is_file()}
    for lost in sorted(_cosigned_runs(histories) - there):
        if run in {None, lost}:
            records.append(
                _record(str(site.work / "runs" / lost / FOLDER), [], ["this site has cosigned it; it is gone"])
            )
    return records


def _cosigned_runs(logs: Sequence[History]) -> set[str]:
    """Runs whose log this site has cosigned, and not pruned since."""
    events = [entry.event for log in logs for entry in log.known.values()]
    pruned = {event.origin.rpartition("/")[2] for event in events if isinstance(event, Pruned)}
    return {event.run for event in events if isinstance(event, Cosigned)} - pruned


def _of_copy(folder: Path, name: str, rosters: Set[bytes], logs: Sequence[History]) -> dict[str, Any]:
    """One copy; what is wrong with it hides no other."""
    if not (folder / LOG).stat().st_size:
        lost = folder.parent.name in _cosigned_runs(logs)
        return _record(str(folder), ["nothing is there"], ["this site has cosigned leaves of it"] if lost else [])
    try:
        record = read_record(folder)
        verdict, history = verify_run(record)
    except SecurityError as error:
        return _record(str(folder), [], [error.message])
    run = verdict.origin.rpartition("/")[2]
    own = next((log for log in logs if log.find("run_accepted", run)), logs[-1])
    statements = _statements(verdict, record, compared=True)
    doubts = [*missing(verdict, history, record), *reconcile(name, verdict, history, record, own)]
    if verdict.roster.hash not in rosters:
        doubts.append("its roster is neither given nor installed here")
    if (number := unwitnessed(history, own, run)) is not None:
        statements.append(f"round {number}: this site has released shares, and no step tells what became of them")
    if not doubts:
        statements.append("goes together with this site's own log")
    return _record(f"{folder}: {verdict.origin}", statements, doubts)


def _ledger_doubts(keys: Path, own: History) -> list[str]:
    """Every round that was charged is in the privacy ledger as it was then: who puts back an older one is found."""
    hashes = Ledger(keys).hashes()
    doubts = []
    for entry in own.known.values():
        event = entry.event
        if isinstance(event, Charged) and (len(hashes) < event.charges or hashes[event.charges - 1] != event.ledger):
            doubts.append(f"run {event.run}, round {event.round}: the privacy ledger is not the one that was charged")
    return doubts


def _of_own(path: Path, roster: Path | None) -> dict[str, Any]:
    """One of an organisation's own logs, by itself."""
    with _naming(path):
        log = own_logs.read_one(path)
        statements = [_length(log), f"signed with the key {log.key.vkey}"]
        if roster:
            statements.append(f"in {roster} that is {_holder(roster, log.key)}")
    return _record(f"{path}: {log.key.name}", statements, [])


def _length(log: OwnRecord) -> str:
    return f"{len(log.history.tree)} leaves in order, {len(log.history.tree) - log.signed} of them not signed yet"


def _holder(roster: Path, key: Key) -> str:
    """Whose log key this is; SecurityError where it is nobody's."""
    body = keystore.load_document(roster, SignedRoster).roster
    holders = [member.name for member in body.members if bytes.fromhex(member.log) == key.public]
    if not holders:
        raise SecurityError(f"nobody in {roster} has its key")
    return holders[0]


def _of_fork(path: Path, roster: Path | None) -> dict[str, Any]:
    try:
        with _naming(path):
            fork = Fork.decode(path.read_bytes())
    except DecodeError as error:
        raise UsageError(error.message, hint="name a folder, or a site's fork.json") from error
    statements = [f"whoever holds the key {fork.key.vkey} has signed two histories of one log"]
    if roster:
        with _naming(path):
            statements.append(f"in {roster} that is {_holder(roster, fork.key)}")
    else:
        statements.append("--roster says who that is")
    return _record(f"{path}: {fork.key.name}", statements, [])


def _statements(verdict: Verdict, record: Record, *, compared: bool) -> list[str]:
    roster, signed = verdict.roster, max(verdict.signed, verdict.witnessed)
    same = "" if compared else "; --roster compares it with one that you have from elsewhere"
    lines = [
        f"{verdict.leaves} leaves in order, the first {signed} as {roster.coordinator.name} has signed them",
        f"roster version {roster.version}, hash {roster.hash.hex()[:16]}…{same}",
    ]
    if verdict.steps:
        last = verdict.steps[-1]
        needed = verdict.contract.agreement if verdict.contract else 0
        names = ", ".join(last.witnesses)
        at = datetime.datetime.fromtimestamp(max(last.witnesses.values()), datetime.UTC)
        lines.append(f"the first {verdict.witnessed} witnessed at step {last.number} by {names} ({needed} are needed)")
        lines.append(f"the last of them cosigned at {at:%Y-%m-%d %H:%M:%S} UTC, by its own clock")
    else:
        lines.append("no step was witnessed")
    if rest := signed - verdict.witnessed:
        lines.append(f"{rest} after these are {roster.coordinator.name}'s word alone")
    if unsigned := verdict.leaves - signed:
        lines.append(f"the last {unsigned} are NOT SIGNED: whoever can write the file may have written them")
    if record.rest:
        lines.append(f"{len(record.rest)} bytes behind the last leaf are none")
    of = f" of {verdict.contract.rounds}" if verdict.contract else ""
    ended = "" if verdict.end is None else f"; the run ended with exit code {verdict.end}"
    return [*lines, f"{verdict.rounds}{of} rounds are closed{ended}"]


def _record(log: str, statements: list[str], doubts: list[str]) -> dict[str, Any]:
    return {"log": log, "statements": statements, "doubts": doubts}


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except SecurityError as error:
        raise type(error)(f"{path}: {error.message}", hint=error.hint, culprits=error.culprits) from error
