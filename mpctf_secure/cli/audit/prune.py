"""The end of a log's retention: it goes as a whole, and what it ended with stays known."""

import datetime
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

from mpctf_secure import files
from mpctf_secure.auditlog import own as own_logs
from mpctf_secure.auditlog.history import History, HistoryOfRun
from mpctf_secure.auditlog.note import Checkpoint, Note
from mpctf_secure.auditlog.own_events import Pruned
from mpctf_secure.auditlog.storage import FOLDER, LOG, read_record, take_all
from mpctf_secure.cli.own_log import own_log
from mpctf_secure.errors import UsageError, blaming
from mpctf_secure.transport.tls import utc_now


def prune_logs(keys: Path, runs: Path | None, days: int) -> Iterator[str]:
    """The origins of the logs that were deleted: own ones that are not written any more, and those of runs."""
    limit, own = utc_now() - datetime.timedelta(days=days), own_log(keys)
    *old, _ = own_logs.verified(keys)
    of_organisation = [(record.key.name, own_logs.folder_of(keys, record.key), record.history) for record in old]
    for origin, folder, history in itertools.chain(of_organisation, _of_runs(runs)):
        if history.last and history.last < limit:
            own.append(Pruned(origin=origin, size=len(history.tree), root=history.tree.root().hex()))
            with files.writing(folder):
                shutil.rmtree(folder)
            yield origin


def _of_runs(runs: Path | None) -> Iterator[tuple[str, Path, History]]:
    if runs and not runs.is_dir():
        raise UsageError(f"{runs}: no such folder", hint="--runs names a coordinator's runs/, or a site's work/runs/")
    for path in sorted(runs.glob(f"*/{FOLDER}/{LOG}")) if runs else []:
        record = read_record(path.parent)
        if record.notes:  # else nothing was ever signed, and whatever is there is no evidence
            origin = Checkpoint.decode(Note.decode(next(iter(record.notes.values()))).text).origin
            with blaming(str(path.parent), str(path.parent)):
                history = take_all(record.lines, HistoryOfRun())
            yield origin, path.parent, history
