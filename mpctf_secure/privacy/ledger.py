"""What a site has published of a data set with noise, and what that costs: charged before it leaves, never given back.

`ledger.jsonl`, a line a charge, with the hash of the line before; `ledger.head` has their number and the last hash.
A line is on disk before its head, and its head before anything leaves. Both are kept where the keys are: who goes on
with an older copy of them, or elsewhere with the same rows, is not noticed here.
"""

import contextlib
import fcntl
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mpctf_secure import files
from mpctf_secure.config.base import Frozen, Hex32, Wire
from mpctf_secure.config.privacy import Against
from mpctf_secure.config.site import Budget, Unit
from mpctf_secure.errors import BudgetSpentError, DecodeError, EnvironmentUnfitError, SecurityError, UsageError
from mpctf_secure.hazmat.kdf import HASH_BYTES, sha256
from mpctf_secure.privacy.accountant import Cost, Release, cost_of_integers

_LEDGER, _HEAD, _LOCK = "ledger.jsonl", "ledger.head", "ledger.lock"
_FIRST = bytes(HASH_BYTES).hex()


class Charge(Frozen):
    """One release: of which rows, in which round, what exactly, and with how much noise against whom."""

    data_set: str
    fingerprint: Hex32
    rows: Annotated[int, Field(ge=1)]
    run: str
    contract: Hex32
    round: int
    content: Hex32
    """Of what leaves: the same again costs nothing."""
    against: Against | Literal["nobody"]
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    """On the sum of updates; None where there is none."""
    colluders: Annotated[int, Field(ge=0)]
    """Participants, beside the coordinator, whom the noise on updates bears."""
    dpsgd: Release | None = None
    """In the training; it holds against everybody."""

    def release(self, unit: Unit, against: Against) -> Release | None:
        """What the accountant counts; None where it does not protect this unit against those.

        A changed record may make another update of norm C in place of the one that there was, 2C away from it.
        """
        if unit == "record" and self.dpsgd:
            return self.dpsgd
        if self.noise_multiplier is None or (against == "coordinator" != self.against):
            return None
        return Release(self.noise_multiplier / 2 if unit == "record" else self.noise_multiplier)


class _Line(Wire):
    previous: Hex32
    charge: Charge


class _Head(Wire):
    count: Annotated[int, Field(ge=0)]
    last: Hex32


class Ledger:
    """The ledger in a keys folder; every call reads it anew, under its lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def charges(self) -> list[Charge]:
        """All of them; SecurityError for a ledger that was shortened or changed."""
        with self._locked():
            return [line.charge for line in self._read(mends=False)]

    def hashes(self) -> list[str]:
        """Of every line: what the own audit log has of the last one at that time."""
        with self._locked():
            return [_hash(line) for line in self._read(mends=False)]

    def charge(self, charge: Charge, budget: Budget | None, *, accept_change: bool = False) -> tuple[int, str]:
        """Put it on disk, unless it is there already; how many charges there are up to it, and its line's hash.

        BudgetSpentError where it would cost more than `budget`; UsageError where the rows are others than before and
        nobody has accepted that.
        """
        with self._locked():
            lines = self._read(mends=True)
            known = [line.charge for line in lines]
            if charge in known:
                return known.index(charge) + 1, _hash(lines[known.index(charge)])
            check_rows(known, charge.data_set, charge.fingerprint, accept_change=accept_change)
            if budget:
                check_budget([*known, charge], charge.data_set, budget)
            return len(lines) + 1, self._append(lines, charge)

    def _append(self, lines: Sequence[_Line], charge: Charge) -> str:
        line = _Line(previous=_hash(lines[-1]) if lines else _FIRST, charge=charge)
        path = self._folder / _LEDGER
        with files.writing(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "ab") as stream:
                stream.write(line.encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
            self._write_head([*lines, line])
        return _hash(line)

    def _read(self, *, mends: bool) -> list[_Line]:
        """The whole chain. What a crash tore off the end, or left without its head, was not published yet."""
        path, head = self._folder / _LEDGER, self._read_head()
        content = path.read_bytes() if path.exists() else b""
        *whole, torn = content.split(b"\n")
        if torn and mends and len(whole) >= head.count:  # else somebody has edited it, and maybe can put it back
            os.truncate(path, len(content) - len(torn))
        lines, previous = list[_Line](), _FIRST
        for number, raw in enumerate(whole, 1):
            try:
                line = _Line.decode(raw)
            except DecodeError as error:
                raise self._spoilt(f"line {number}: {error.message}") from error
            if line.previous != previous or line.encode() != raw:
                raise self._spoilt(f"line {number} does not follow the one before")
            lines.append(line)
            previous = _hash(line)
        if len(lines) - head.count not in {0, 1}:
            raise self._spoilt(f"{len(lines)} lines, {_HEAD} says {head.count}")
        if head.count and _hash(lines[head.count - 1]) != head.last:
            raise self._spoilt(f"line {head.count} is not the one that {_HEAD} knows")
        if mends and len(lines) > head.count:
            self._write_head(lines)
        return lines

    def _write_head(self, lines: Sequence[_Line]) -> None:
        files.replace(self._folder / _HEAD, _Head(count=len(lines), last=_hash(lines[-1])).encode())

    def _read_head(self) -> _Head:
        path = self._folder / _HEAD
        if not path.exists():
            return _Head(count=0, last=_FIRST)
        try:
            return _Head.decode(path.read_bytes())
        except DecodeError as error:
            raise SecurityError(f"{path}: {error.message}", hint=_RESTORE) from error

    def _spoilt(self, why: str) -> SecurityError:
        return SecurityError(f"{self._folder / _LEDGER}: {why}", hint=_RESTORE)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self._folder / _LOCK
        if not self._folder.is_dir():
            raise EnvironmentUnfitError(
                f"{self._folder}: no keys folder", hint="mpctf-secure enroll init NAME makes it"
            )
        with files.writing(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


_RESTORE = "restore it: without it nobody knows what was spent"


def _hash(line: _Line) -> str:
    return sha256(line.encode()).hex()


def spent(charges: Sequence[Charge], data_set: str, unit: Unit, against: Against, delta: float) -> Cost:
    """What the charges of a data set cost together at δ; ∞ where one of them protects no such unit against those."""
    releases = list[Release]()
    for charge in charges:
        if charge.data_set == data_set:
            release = charge.release(unit, against)
            if release is None:
                return Cost(math.inf, f"run {charge.run} has no noise for that")
            releases.append(release)
    return cost_of_integers(releases, delta)


def check_budget(charges: Sequence[Charge], data_set: str, budget: Budget) -> None:
    """BudgetSpentError where they cost more than the budget."""
    total = spent(charges, data_set, budget.unit, budget.against, budget.delta)
    if total.epsilon > budget.epsilon:
        raise BudgetSpentError(
            f"privacy budget of data set {data_set}: epsilon of a {budget.unit} would be {total.epsilon:.4g}, "
            f"policy.budget.epsilon is {budget.epsilon:g}",
            hint="mpctf-secure privacy report SITE.yaml shows what it was spent on",
        )


def check_rows(charges: Sequence[Charge], data_set: str, fingerprint: str, *, accept_change: bool) -> None:
    """UsageError where a data set has other rows than those that were charged last, or the same as another: a typing
    error in a name, or more rows; what was spent stays spent, of each name by itself."""
    last = next((charge for charge in reversed(charges) if charge.data_set == data_set), None)
    if accept_change or (last and last.fingerprint == fingerprint):
        return
    if last:
        raise UsageError(
            f"data: the file has changed since data set {data_set} was charged for run {last.run}",
            hint="join --accept-data-change goes on, and keeps what was spent; wholly other rows are another data_set",
        )
    same = next((charge for charge in charges if charge.fingerprint == fingerprint), None)
    if same:
        raise UsageError(
            f"data_set {data_set}: the same file was charged as data set {same.data_set} for run {same.run}",
            hint=f"data_set: {same.data_set}; join --accept-data-change counts it anew, as if nothing was spent",
        )
