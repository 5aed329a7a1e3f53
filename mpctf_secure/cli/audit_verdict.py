"""What `audit verify` finds, for people and programs: a record for each log, of statements and of doubts."""

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpctf_secure.auditlog import own as own_logs
from mpctf_secure.auditlog.events import Charged
from mpctf_secure.auditlog.history import History
from mpctf_secure.auditlog.storage import read_record
from mpctf_secure.cli.join import load_site
from mpctf_secure.errors import SecurityError, UsageError
from mpctf_secure.identity import keystore
from mpctf_secure.identity.documents import SignedRoster
from mpctf_secure.participant.witness import AUDIT
from mpctf_secure.privacy.ledger import Ledger
from mpctf_secure.rounds.audit import Fork, Verdict, find_fork, reconcile, run_log_key, verify_run


def of_logs(paths: Sequence[Path], roster: Path | None) -> list[dict[str, Any]]:
    """Audit folders of runs, files of evidence; two folders of one run are held against each other."""
    records = []
    seen = dict[str, tuple[Path, Any]]()
    for path in paths:
        if path.is_file():
            records.append(_of_fork(path, roster))
            continue
        with _naming(path):
            record = read_record(path)
            verdict, _ = verify_run(record)
            if roster and keystore.load_document(roster, SignedRoster).roster.hash != verdict.roster.hash:
                raise SecurityError(f"its roster is another one than {roster}")
        statements, doubts = _statements(verdict, compared=roster is not None), []
        if verdict.origin in seen:
            other, known = seen[verdict.origin]
            if fork := find_fork(known, record, run_log_key(verdict.roster, verdict.origin.rpartition("/")[2])):
                evidence = Path("fork.json")
                evidence.write_bytes(fork.encode())
                doubts.append(f"{other} has another history: {evidence} convicts {verdict.roster.coordinator.name}")
            else:
                statements.append(f"no checkpoint contradicts one of {other}")
        seen[verdict.origin] = path, record
        records.append(_record(f"{path}: {verdict.origin}", statements, doubts))
    return records


def of_site(site_file: Path, run: str = "*") -> list[dict[str, Any]]:
    """A site's own logs, and the copies of all runs' logs, or of one, against them."""
    site = load_site(site_file)
    name, records = keystore.organisation(site.keys).name, []
    logs = own_logs.verified(site.keys)
    rosters = keystore.all_rosters(site.keys)
    known = {member.log for roster in rosters for member in roster.members if member.name == name}
    for log in logs:
        doubts = [] if log.key.public in known else ["no installed roster has its key"]
        unsigned = len(log.history.tree) - log.signed
        statements = [f"{len(log.history.tree)} leaves, unchanged and in order, {unsigned} of them not signed yet"]
        records.append(_record(log.key.name, statements, doubts + _ledger_doubts(site.keys, log.history)))
    if not logs:
        raise UsageError(f"{site.keys}: no own log yet", hint="it begins with the first join")
    for folder in sorted((site.work / "runs").glob(f"{run}/{AUDIT}")):
        with _naming(folder):
            record = read_record(folder)
            verdict, history = verify_run(record)
        name_of_run = verdict.origin.rpartition("/")[2]
        accepted = (one.history for one in logs if one.history.find("run_accepted", name_of_run))
        mine = next(accepted, logs[-1].history)
        statements = [*_statements(verdict, compared=True), "goes together with this site's own log"]
        doubts = reconcile(name, verdict, history, record, mine)
        records.append(_record(f"{folder}: {verdict.origin}", statements[: -1 if doubts else None], doubts))
    return records


def _ledger_doubts(keys: Path, own: History) -> list[str]:
    """Every round that was charged is in the privacy ledger as it was then: who puts back an older one is found."""
    hashes = Ledger(keys).hashes()
    doubts = []
    for entry in own.known.values():
        event = entry.event
        if isinstance(event, Charged) and (len(hashes) < event.charges or hashes[event.charges - 1] != event.ledger):
            doubts.append(f"run {event.run}, round {event.round}: the privacy ledger is not the one that was charged")
    return doubts


def _of_fork(path: Path, roster: Path | None) -> dict[str, Any]:
    with _naming(path):
        fork = Fork.decode(path.read_bytes())
    statements = [f"whoever holds the key {fork.key.vkey} has signed two histories of one log"]
    if roster:
        body = keystore.load_document(roster, SignedRoster).roster
        holders = [member.name for member in body.members if bytes.fromhex(member.log) == fork.key.public]
        if not holders:
            raise SecurityError(f"{path}: nobody in {roster} has this key")
        statements.append(f"in {roster} that is {holders[0]}")
    else:
        statements.append("--roster says who that is")
    return _record(f"{path}: {fork.key.name}", statements, [])


def _statements(verdict: Verdict, *, compared: bool) -> list[str]:
    roster = verdict.roster
    same = "" if compared else "; --roster compares it with one that you have from elsewhere"
    lines = [
        f"{verdict.leaves} leaves, unchanged and in order",
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
    if rest := verdict.leaves - verdict.witnessed:
        lines.append(f"the last {rest} are {roster.coordinator.name}'s word alone")
    if unsigned := verdict.leaves - max(verdict.signed, verdict.witnessed):
        lines.append(f"{unsigned} of them are not signed")
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
        raise SecurityError(f"{path}: {error.message}", hint=error.hint, culprits=error.culprits) from error
