"""A log's leaves and proofs as other programs take them; what they say is checked by `audit verify`."""

import datetime
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mpctf_secure import __version__
from mpctf_secure.auditlog.entry import Entry, to_text
from mpctf_secure.auditlog.events import OfRun
from mpctf_secure.auditlog.history import History, HistoryOfRun
from mpctf_secure.auditlog.note import Checkpoint, Key, Note
from mpctf_secure.auditlog.own_events import OfOrganisation
from mpctf_secure.auditlog.proof import Proof
from mpctf_secure.auditlog.storage import LOG, Record, check_below, read_record, take_all
from mpctf_secure.errors import SecurityError, UsageError
from mpctf_secure.rounds.audit import log_key, verify_run

_SEVERE = {"refused": 6, "banned": 7, "veto": 5, "dropout": 3, "attempt_failed": 4, "round_void": 5, "clock_set": 4}
"""Of CEF's 0 to 10; everything else is 1."""
_OCSF_SEVERITY = ((7, 4), (5, 3), (3, 2))
"""From which of the above on which `severity_id`; below: 1, informational."""
_VENDOR, _PRODUCT = "mpctf-secure", "audit log"


def leaves(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and fields of each leaf; SecurityError names one that is none."""
    for number, line in enumerate(_record(folder).lines):
        try:
            entry = Entry.decode(line, OfRun | OfOrganisation)
        except SecurityError as error:
            raise SecurityError(
                f"{folder}: leaf {number}: {error.message}", hint="mpctf-secure audit verify"
            ) from error
        fields = entry.event.model_dump(mode="json", exclude={"kind"})
        yield number, {"kind": entry.event.kind, "time": to_text(entry.time), **fields}


def _record(folder: Path) -> Record:
    if not (folder / LOG).is_file():
        raise UsageError(f"{folder}: no {LOG} here", hint="name an audit folder: of a run, or one of keys/audit/")
    return read_record(folder)


def prove(folder: Path, numbers: Iterable[int], since: int | None = None) -> Proof:
    """That leaves are below a checkpoint, of those above them that with most witnesses.

    `since`: also that the log goes on from its first so many leaves.
    """
    record, wanted = _record(folder), list(numbers)
    least = max(1, since or 0, *(number + 1 for number in wanted))
    try:
        history, keys = _history(record)
        notes = [(check_below(history, Checkpoint.decode(n.text)), n) for n in map(Note.decode, record.notes.values())]
        cosigned = [(sum(note.cosigned_at(key) is not None for key in keys), size, note) for size, note in notes]
    except SecurityError as error:
        raise SecurityError(f"{folder}: {error.message}", hint="mpctf-secure audit verify") from error
    signed = max((size for _, size, _ in cosigned), default=0)
    if signed < least:
        raise UsageError(
            f"{folder}: {signed} of {len(history.tree)} leaves are signed, and not {least}",
            hint="mpctf-secure audit show lists them; a log is signed at the end of each round",
        )
    _, _, note = max((one for one in cosigned if one[1] >= least), key=lambda one: one[:2])
    return Proof.of(history.tree, note, record.lines, wanted, since)


def exported(folder: Path, form: str) -> Iterator[str]:
    """Each leaf as a line of a format: jsonl, cef or ocsf."""
    to_line = {"jsonl": _jsonl, "cef": _cef, "ocsf": _ocsf}[form]
    run = None
    for number, leaf in leaves(folder):
        run = leaf["run"] if leaf["kind"] == "run_opened" else run
        yield to_line(number, leaf if run is None else {"run": run, **leaf})


def _history(record: Record) -> tuple[History, list[Key]]:
    """What a log says, and the keys of those who may have witnessed it: of a run's participants."""
    if record.rosters:
        verdict, history = verify_run(record)
        return history, [log_key(member) for member in verdict.roster.participants]
    kind = HistoryOfRun if record.lines and b'"kind":"run_opened"' in record.lines[0] else History
    return take_all(record.lines, kind()), []


def _jsonl(number: int, leaf: dict[str, Any]) -> str:
    return json.dumps({"leaf": number, **leaf}, ensure_ascii=False)


def _cef(number: int, leaf: dict[str, Any]) -> str:
    """ArcSight Common Event Format, version 0, with what it wants escaped."""
    kind = leaf["kind"]
    header = (_VENDOR, _PRODUCT, __version__, kind, kind.replace("_", " "))
    escaped = "|".join(re.sub(r"([\\|])", r"\\\1", part) for part in header)
    fields = {
        "rt": _milliseconds(leaf["time"]),
        "externalId": number,
        "msg": json.dumps(_rest(leaf), ensure_ascii=False),
    }
    extension = " ".join(f"{name}={_escaped(str(value))}" for name, value in fields.items())
    return f"CEF:0|{escaped}|{_SEVERE.get(kind, 1)}|{extension}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("=", "\\=").replace("\n", "\\n").replace("\r", "\\r")


def _ocsf(number: int, leaf: dict[str, Any]) -> str:
    """An OCSF base event, class 0: what a leaf says is in `unmapped`."""
    severe = _SEVERE.get(leaf["kind"], 1)
    event = {
        "class_uid": 0,
        "category_uid": 0,
        "activity_id": 99,
        "activity_name": leaf["kind"],
        "type_uid": 99,
        "severity_id": next((severity for least, severity in _OCSF_SEVERITY if severe >= least), 1),
        "time": _milliseconds(leaf["time"]),
        "metadata": {
            "version": "1.3.0",
            "sequence": number,
            "product": {"vendor_name": _VENDOR, "name": _PRODUCT, "version": __version__},
        },
        "unmapped": _rest(leaf),
    }
    return json.dumps(event, ensure_ascii=False)


def _rest(leaf: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in leaf.items() if name not in {"kind", "time"}}


def _milliseconds(time: str) -> int:
    return round(datetime.datetime.fromisoformat(time).timestamp() * 1000)
