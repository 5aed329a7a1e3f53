"""What `audit verify` finds, for people and programs: a record for each log, of statements and of doubts."""

import base64
import contextlib
import datetime
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from mpctf_secure import files
from mpctf_secure.auditlog import own as own_logs
from mpctf_secure.auditlog.history import History, HistoryOfRun
from mpctf_secure.auditlog.note import Checkpoint, Key
from mpctf_secure.auditlog.own import OwnRecord
from mpctf_secure.auditlog.own_events import Charged, Cosigned, Pruned
from mpctf_secure.auditlog.proof import Proof
from mpctf_secure.auditlog.storage import FOLDER, LOG, Record, read_record
from mpctf_secure.cli.join import load_site
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.errors import DecodeError, SecurityError, UsageError, blaming
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity import keystore
from mpctf_secure.identity.documents import SignedRoster
from mpctf_secure.identity.enrollment import verify_form
from mpctf_secure.identity.roster import Roster, view
from mpctf_secure.participant.witness import FORK
from mpctf_secure.privacy.ledger import Ledger
from mpctf_secure.rounds.audit import (
    Fork,
    Verdict,
    contradicts,
    find_fork,
    log_key,
    missing,
    reconcile,
    run_log_key,
    uncommitted,
    unwitnessed,
    verify_run,
)


class Finding(NamedTuple):
    """What was found out about one log."""

    log: str
    """Its folder and origin."""
    facts: Mapping[str, object]
    """What holds, for programs."""
    statements: list[str]
    """The same in words."""
    doubts: list[str]
    """What is not right."""

    def fields(self) -> dict[str, object]:
        """For JSON."""
        return {"log": self.log, **self.facts, "statements": self.statements, "doubts": self.doubts}


class _Seen(NamedTuple):
    """A run's log that was verified."""

    path: Path
    record: Record
    verdict: Verdict
    history: HistoryOfRun


def of_logs(paths: Sequence[Path], roster: Path | None) -> list[Finding]:
    """Audit folders of runs, own logs, files of evidence; folders of one run are held against each other.

    What is wrong with one hides no other.
    """
    known = _roster_in(roster) if roster else None
    findings, seen = list[Finding](), dict[Path, _Seen]()
    for path in paths:
        if path.resolve() in {other.resolve() for other in seen}:
            raise UsageError(f"{path}: named twice", hint="a log is held against another one's copy of it")
        try:
            if path.is_file():
                findings.append(_of_file(path, known))
            elif (path / own_logs.KEY).is_file():
                findings.append(_of_own(path, known))
            elif (path / LOG).is_file():
                record = read_record(path)
                seen[path] = _Seen(path, record, *verify_run(record))
                findings.append(_of_run(seen[path], list(seen.values())[:-1], known))
            else:
                raise UsageError(
                    f"{path}: no {LOG} here", hint="name the audit folder of a run, or of a site's copy of it"
                )
        except SecurityError as error:
            findings.append(_refused(str(path), error))
    return findings


def _roster_in(path: Path) -> Roster:
    body = keystore.load_document(path, SignedRoster).roster
    with blaming(str(path), str(path)):
        verify_form(body)
    return view(body)


def _refused(log: str, error: SecurityError) -> Finding:
    return Finding(log, {}, [], [f"{error.message}; {error.hint}" if error.hint else error.message])


def _of_run(one: _Seen, others: Sequence[_Seen], roster: Roster | None) -> Finding:
    statements = _statements(one.verdict, one.record, given=roster is not None)
    doubts = missing(one.verdict, one.history, one.record)
    if roster and roster.hash != one.verdict.roster.hash:
        doubts.append("its roster is another one than that given")
    for other in others:
        if other.verdict.origin == one.verdict.origin:
            found = _compare(one, other)
            (doubts if found else statements).append(found or _longer(one, other))
    return Finding(f"{one.path}: {one.verdict.origin}", _facts(one.verdict), statements, doubts)


def _compare(one: _Seen, other: _Seen) -> str | None:
    """What is wrong between two logs of one run, and a file of evidence where two checkpoints are enough for that."""
    key = run_log_key(one.verdict.roster, one.verdict.origin.rpartition("/")[2])
    fork = find_fork(one.record, other.record, key)
    if fork is None:
        size = contradicts(one.record, other.history, key) or contradicts(other.record, one.history, key)
        if size is None:
            return None
        return f"{other.path} has another history: its first {size} leaves, which were signed, are others"
    evidence = Path(f"fork-{sha256(fork.encode()).hex()[:8]}.json")
    with files.writing(evidence):
        files.replace(evidence, fork.encode())
    return f"{other.path} has another history: {evidence} convicts {one.verdict.roster.coordinator.name}"


def _longer(one: _Seen, other: _Seen) -> str:
    more = one.verdict.leaves - other.verdict.leaves
    length = f"; it has {abs(more)} leaves {'more' if more > 0 else 'less'}" if more else ""
    return f"no checkpoint contradicts one of {other.path}{length}"


def of_site(site_file: Path, run: str | None = None, given: Path | None = None) -> list[Finding]:
    """A site's own logs, and the copies of all runs' logs, or of one, against them."""
    site = load_site(site_file)
    findings = _look_at(site, run, given)
    if any(one.doubts for one in findings):  # of a run that is on, one log may have been read before it had the last
        findings = _look_at(site, run, given)
    return findings


def _look_at(site: SiteConfig, run: str | None, given: Path | None) -> list[Finding]:
    name, findings = keystore.organisation(site.keys).name, list[Finding]()
    try:
        logs = own_logs.verified(site.keys)
    except SecurityError as error:
        return [_refused(str(site.keys), error)]
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
        doubts += _ledger_doubts(site.keys, log.history)
        findings.append(Finding(log.key.name, _own_facts(log), [_length(log)], doubts))
    hashes = {_roster_in(given).hash} if given else {one.hash for one in rosters}
    histories = [log.history for log in logs]
    cosigned = _cosigned_runs(histories)
    for folder in copies:
        if run in {None, folder.parent.name} and (folder / LOG).is_file():
            findings.append(_of_copy(folder, name, hashes, histories, cosigned))
    there = {folder.parent.name for folder in copies if (folder / LOG).is_file()}
    for lost in sorted(cosigned - there):
        if run in {None, lost}:
            folder = site.work / "runs" / lost / FOLDER
            findings.append(Finding(str(folder), {}, [], ["this site has cosigned it; it is gone"]))
    return findings


def _cosigned_runs(logs: Sequence[History]) -> set[str]:
    """Runs whose log this site has cosigned, and not pruned since."""
    events = [entry.event for log in logs for entry in log.known.values()]
    pruned = {event.origin.rpartition("/")[2] for event in events if isinstance(event, Pruned)}
    return {event.run for event in events if isinstance(event, Cosigned)} - pruned


def _of_copy(folder: Path, name: str, rosters: Set[bytes], logs: Sequence[History], cosigned: Set[str]) -> Finding:
    """One copy; what is wrong with it hides no other."""
    if not (folder / LOG).stat().st_size:
        doubts = ["this site has cosigned leaves of it"] if folder.parent.name in cosigned else []
        return Finding(str(folder), {}, ["nothing is there"], doubts)
    try:
        record = read_record(folder)
        verdict, history = verify_run(record)
    except SecurityError as error:
        return _refused(str(folder), error)
    run = verdict.origin.rpartition("/")[2]
    own = next((log for log in logs if log.find("run_accepted", run)), logs[-1])
    statements = _statements(verdict, record, given=True)
    doubts = [*missing(verdict, history, record), *reconcile(name, verdict, history, record, own)]
    if (folder / FORK).is_file():
        doubts.append(f"{FORK}: the coordinator has signed two histories; mpctf-secure audit verify {folder / FORK}")
    if verdict.roster.hash not in rosters:
        doubts.append("its roster is neither given nor installed here")
    if (number := unwitnessed(history, own, run)) is not None:
        statements.append(f"round {number}: this site has released shares, and no step tells what became of them")
    statements += uncommitted(name, verdict)
    if not doubts:
        statements.append("nothing contradicts this site's own log")
    return Finding(f"{folder}: {verdict.origin}", _facts(verdict), statements, doubts)


def _ledger_doubts(keys: Path, own: History) -> list[str]:
    """Every round that was charged is in the privacy ledger as it was then: who puts back an older one is found."""
    hashes = Ledger(keys).hashes()
    doubts = []
    for entry in own.known.values():
        event = entry.event
        if isinstance(event, Charged) and (len(hashes) < event.charges or hashes[event.charges - 1] != event.ledger):
            doubts.append(f"run {event.run}, round {event.round}: the privacy ledger is not the one that was charged")
    return doubts


def _of_own(path: Path, roster: Roster | None) -> Finding:
    """One of an organisation's own logs, by itself."""
    log = own_logs.read_one(path)
    statements = [_length(log), f"the key is {log.key.vkey}", *_holder(log.key, roster)]
    doubts = [] if log.signed else ["nothing of it is signed: whoever can write the file may have written it"]
    return Finding(f"{path}: {log.key.name}", _own_facts(log), statements, doubts)


def _length(log: OwnRecord) -> str:
    return f"{len(log.history.tree)} leaves in order, {len(log.history.tree) - log.signed} of them not signed yet"


def _own_facts(log: OwnRecord) -> dict[str, object]:
    return {"origin": log.key.name, "leaves": len(log.history.tree), "signed": log.signed}


def _holder(key: Key, roster: Roster | None) -> list[str]:
    """Whose log key this is; SecurityError where it is nobody's."""
    if roster is None:
        return ["--roster says who that is"]
    for member in roster.members:
        if member.log == key.public and key.name.startswith(f"{member.name}/"):
            return [f"in roster version {roster.version}, hash {roster.hash.hex()[:16]}…, that is {member.name}"]
    raise SecurityError(f"{key.name.partition('/')[0]} does not have its key in the given roster")


def _of_file(path: Path, roster: Roster | None) -> Finding:
    data = path.read_bytes()
    with contextlib.suppress(DecodeError):
        return _of_fork(path, Fork.decode(data), roster)
    try:
        proof = Proof.decode(data)
    except DecodeError as error:
        raise UsageError(
            f"{path}: neither a proof nor evidence", hint="`audit prove` writes the one, a site the other: fork.json"
        ) from error
    if roster is None:
        raise UsageError(f"{path}: a proof is checked with the keys of a roster", hint="add --roster roster-N.json")
    return _of_proof(path, proof, roster)


def _of_proof(path: Path, proof: Proof, roster: Roster) -> Finding:
    origin = Checkpoint.decode(proof.note.text).origin
    name, log, run = [*origin.split("/", 2), "", ""][:3]
    if log == "run":
        key, witnesses = run_log_key(roster, run), roster.participants
    else:
        holder = next((member for member in roster.members if member.name == name), None)
        if holder is None:
            raise SecurityError(f"{name} is not in the given roster")
        key, witnesses = Key(origin, holder.log), ()
    size = proof.verify(key).size
    cosigned = {str(one.name): proof.note.cosigned_at(log_key(one)) for one in witnesses}
    times = {one: time for one, time in cosigned.items() if time is not None}
    enough = "the contract says how many are needed"
    statements = [
        f"{name} has signed a log of {size} leaves" + (f"; cosigned by {', '.join(times)}; {enough}" if times else ""),
        *(f"leaf {one.index} is in it: {one.leaf.decode()}" for one in proof.leaves),
    ]
    if proof.since:
        root = base64.b64encode(proof.since.root).decode()
        statements.append(f"it continues the log of {proof.since.size} leaves with the root {root}")
    facts = {"origin": origin, "signed": size, "witnesses": times, "leaves": [one.index for one in proof.leaves]}
    return Finding(f"{path}: {origin}", facts, statements, [])


def _of_fork(path: Path, fork: Fork, roster: Roster | None) -> Finding:
    vkey = fork.key.vkey
    statements = [f"whoever holds the key {vkey} has signed two histories of one log", *_holder(fork.key, roster)]
    return Finding(f"{path}: {fork.key.name}", {"origin": fork.key.name, "convicted_key": vkey}, statements, [])


def _facts(verdict: Verdict) -> dict[str, object]:
    """Times are the witnesses' own, in seconds since 1970."""
    contract = verdict.contract
    return {
        "origin": verdict.origin,
        "roster": verdict.roster.hash.hex(),
        "first_roster": verdict.first_roster,
        "contract": contract.hash.hex() if contract else None,
        "leaves": verdict.leaves,
        "signed": verdict.signed,
        "witnessed": verdict.witnessed,
        "witnesses_needed": contract.agreement if contract else None,
        "steps": [step._asdict() for step in verdict.steps],
        "rounds_closed": verdict.rounds,
        "rounds": contract.rounds if contract else None,
        "exit_code": verdict.end,
    }


def _statements(verdict: Verdict, record: Record, *, given: bool) -> list[str]:
    roster, signed = verdict.roster, verdict.signed
    same = "" if given else "; --roster compares it with one that you have from elsewhere"
    lines = [
        f"{verdict.leaves} leaves in order, the first {signed} as {roster.coordinator.name} has signed them",
        f"roster version {roster.version}, hash {roster.hash.hex()[:16]}…{same}",
    ]
    if verdict.first_roster > 1:
        lines.append(f"who signed roster version {verdict.first_roster} was not checked: the one before is not here")
    if verdict.steps:
        last = verdict.steps[-1]
        needed = verdict.contract.agreement if verdict.contract else 0
        names = ", ".join(last.witnesses)
        at = datetime.datetime.fromtimestamp(max(last.witnesses.values()), datetime.UTC)
        lines.append(f"the first {verdict.witnessed} witnessed at step {last.number} by {names} ({needed} are needed)")
        lines.append(f"the last of them cosigned at {at:%Y-%m-%d %H:%M:%S} UTC, by its own clock")
    else:
        lines.append("no certificate was checked" if record.certificates else "no step was witnessed")
    if rest := signed - verdict.witnessed:
        lines.append(f"{rest} after these are {roster.coordinator.name}'s word alone")
    if unsigned := verdict.leaves - signed:
        lines.append(f"the last {unsigned} are NOT SIGNED: whoever can write the file may have written them")
    if record.rest:
        lines.append(f"{len(record.rest)} bytes behind the last leaf are none")
    of = f" of {verdict.contract.rounds}" if verdict.contract else ""
    ended = "" if verdict.end is None else f"; the run ended with exit code {verdict.end}"
    return [*lines, f"{verdict.rounds}{of} rounds are closed{ended}"]
