"""What witnesses ask of a run's log, and what they say of it: AUDIT.md section 3."""

from collections.abc import Iterable
from typing import Any

from mpctf_secure.auditlog.history import History
from mpctf_secure.auditlog.note import Checkpoint, Key, Line, Note
from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import sha256

_WITH_ATTEMPT = 2
_MOST_COSIGNATURES = 99  # with the log's own one as many as golang.org/x/mod/sumdb/note reads


def origin_of_run(coordinator: str, run: str) -> str:
    """The origin of a run's log, and the name of its key."""
    return f"{coordinator}/run/{run}"


def step_line(step: int) -> str:
    """The line of a checkpoint of which the coordinator signs one only."""
    return f"mpctf-secure/step {step}"


def check_step(note: Note, key: Key, step: int) -> Checkpoint:
    """A run's checkpoint of this step, signed by its coordinator; SecurityError otherwise."""
    checkpoint = note.checkpoint(key)
    if checkpoint.extra != (step_line(step),):
        raise SecurityError(f"checkpoint is not of step {step} of {key.name}")
    return checkpoint


def is_fork(one: Note, other: Note, key: Key) -> bool:
    """Whether two notes convict a log: both signed by it, of the same step or the same size, and not the same."""
    try:
        first, second = one.checkpoint(key), other.checkpoint(key)
    except SecurityError:
        return False
    same = (first.extra == second.extra != ()) or first.size == second.size
    return same and (first.size, first.root) != (second.size, second.root)


def line_of(key: Key, cosignature: bytes) -> Line:
    """A cosignature as it travels, as the line of a note."""
    return Line(key.name, key.cosigner_id, cosignature)


def check_cosignature(note: Note, key: Key, cosignature: bytes) -> None:
    """SecurityError where this is none of the note by this witness."""
    Note(note.text, (line_of(key, cosignature),)).cosigned_at(key)


def witnessed(note: Note, cosignatures: Iterable[tuple[Key, bytes]]) -> Note:
    """The note for those who come later, with as many cosignatures as other programs read."""
    by_name = sorted(cosignatures, key=lambda one: one[0].name)
    lines = [line_of(key, cosignature) for key, cosignature in by_name]
    return note.with_lines(lines[:_MOST_COSIGNATURES])


def head(salt: bytes, size: int, root: bytes) -> bytes:
    """Commits to an organisation's own log without telling how long it is; `salt` is 32 random bytes."""
    return sha256(enc("mpctf-secure/log-head/v1", salt, size, root))


def demand(history: History, kind: str, *which: int, **fields: Any) -> None:
    """SecurityError where the log has no such event, or has it with other fields: who asks knows better."""
    where = f" of {'round' if len(which) < _WITH_ATTEMPT else 'attempt'} {'.'.join(map(str, which))}" if which else ""
    entry = history.find(kind, *which)
    if entry is None:
        raise SecurityError(f"the log hides {kind}{where}")
    for name, value in fields.items():
        if getattr(entry.event, name) != value:
            raise SecurityError(f"the log has another {name} in {kind}{where}")
