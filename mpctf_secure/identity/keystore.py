"""The only file that touches a keys/ folder, but for the privacy ledger and the own audit log there.

    organisation.json      name and role
    IDENTITY.sealed        the private keys of an identity, under the passphrase; two while a rotation is under way
    rosters/N.json         every roster that was installed, from the first one here to the one in force
    compared.json          which rosters' words were heard from whom
    votes/N.json           what this organisation signed
    rounds/*.key           keys of rounds and runs that are not closed, protected by mode 0600 alone
    rounds/RUN.joined      the highest round of a run that was ever joined

Files appear as a whole, and nothing is overwritten but compared.json and RUN.joined.
"""

import contextlib
import datetime
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from mpctf_secure import files
from mpctf_secure.errors import DecodeError, EnvironmentUnfitError, SecurityError, UsageError
from mpctf_secure.hazmat import passphrase
from mpctf_secure.hazmat.passphrase import Cost
from mpctf_secure.hazmat.signature import KEY_BYTES
from mpctf_secure.identity import enrollment
from mpctf_secure.identity.documents import (
    MOST_BYTES,
    Comparison,
    Document,
    Organisation,
    RosterBody,
    SignedRoster,
    Vote,
    decode_any,
    from_time,
)
from mpctf_secure.identity.keys import SECRET_BYTES, Keys
from mpctf_secure.identity.roster import Roster, view

_ORGANISATION, _COMPARED, _SEALED = "organisation.json", "compared.json", ".sealed"
_ROSTERS, _VOTES, _ROUNDS = "rosters", "votes", "rounds"
_JOINED = ".joined"
_RUN_SUFFIX = ".run"  # a dot is in no run's name, so no round of another run has this file
_HINT = "check the keys folder that the site or run file names"

D = TypeVar("D", bound=Document)


def create(folder: Path, owner: Organisation, phrase: bytes, cost: Cost) -> Keys:
    """Draw keys into a new folder of mode 0700, which is there with all its files or not at all.

    UsageError rather than replace any.
    """
    with contextlib.ExitStack() as steps:
        steps.enter_context(files.writing(folder))
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = steps.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-"))
        made = Path(unfinished) / folder.name
        made.mkdir(mode=0o700)
        files.create(made / _ORGANISATION, owner.encode())
        keys = draw(made, phrase, cost)
        try:
            made.rename(folder)
        except OSError as error:
            raise UsageError(
                f"{folder}: exists already", hint="keys are never overwritten; name another folder with --keys"
            ) from error
    files.sync(folder.parent)
    return keys


def draw(folder: Path, phrase: bytes, cost: Cost) -> Keys:
    """Fresh keys beside those that are there: they are in force once a roster has them."""
    secret = os.urandom(SECRET_BYTES)
    keys = Keys.of(secret)
    entropy = os.urandom(passphrase.SALT_BYTES + passphrase.NONCE_BYTES)
    files.create(_sealed(folder, keys.identity.public), passphrase.seal(phrase, secret, cost, entropy))
    return keys


def unseal(folder: Path, phrase: bytes, identity: bytes | None = None) -> Keys:
    """The private keys of an identity, by default of the one in force.

    WrongPassphraseError; DecodeError for a damaged file or an absurd cost, SecurityError for a loose mode.
    """
    path = _sealed(folder, identity or _in_force(folder))
    with _naming(path):
        return Keys.of(passphrase.unseal(phrase, _read_private(path)))


def check_sealed(folder: Path) -> list[Path]:
    """The sealed files, all whole and their owner's alone; the passphrase is not needed for that."""
    paths = [_sealed(folder, identity) for identity in identities(folder)]
    if not paths:
        raise EnvironmentUnfitError(f"{folder}: no sealed keys", hint="mpctf-secure enroll init NAME")
    for path in paths:
        with _naming(path):
            passphrase.check(_read_private(path))
    return paths


def newest_request(folder: Path) -> datetime.datetime | None:
    """When the youngest request in the roster was made: no right clock shows an earlier time."""
    current = installed(folder)
    return max(from_time(member.created) for member in current.roster.members) if current else None


def identities(folder: Path) -> list[bytes]:
    """The identities whose private keys are here: one, or two while a rotation is under way."""
    return [bytes.fromhex(path.stem) for path in sorted(folder.glob("[0-9a-f]" * 2 * KEY_BYTES + _SEALED))]


def pending(folder: Path) -> Path | None:
    """The sealed keys that `draw` made and that are not in force."""
    in_force = _in_force(folder)
    return next((_sealed(folder, one) for one in identities(folder) if one != in_force), None)


def _in_force(folder: Path) -> bytes:
    current = installed(folder)
    if current:
        return mine(folder, current)
    if len(found := identities(folder)) == 1:
        return found[0]
    raise EnvironmentUnfitError(f"{folder}: {len(found)} sealed keys and no roster", hint=_HINT)


def mine(folder: Path, signed: SignedRoster) -> bytes:
    """The identity that a roster gives this organisation."""
    name = organisation(folder).name
    for member in signed.roster.members:
        if member.name == name:
            return bytes.fromhex(member.identity)
    raise SecurityError(f"{name} is not in roster version {signed.roster.version}", culprits=[name])


def organisation(folder: Path) -> Organisation:
    """Whose keys these are."""
    if not (folder / _ORGANISATION).exists():
        raise EnvironmentUnfitError(f"{folder}: no keys here", hint="mpctf-secure enroll init NAME, or --keys FOLDER")
    return load_document(folder / _ORGANISATION, Organisation)


def load_document(path: Path, kind: type[D]) -> D:
    """A document's file; the error names it."""
    with _naming(path):
        return kind.decode(_read(path))


def load_any(path: Path) -> Document:
    """A file of the ceremony, of whatever kind."""
    if not path.exists():
        raise UsageError(f"{path}: no such file", hint="check the name, and the folder that you are in")
    with _naming(path):
        return decode_any(_read(path))


def _read(path: Path) -> bytes:
    """No more than a document may have, and one byte."""
    try:
        with path.open("rb") as stream:
            return stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise EnvironmentUnfitError(f"{path}: {error.strerror}", hint="check the path") from error


def latest_version(folder: Path) -> int:
    """Of the installed rosters; 0 where there is none."""
    return max(_versions(folder), default=0)


def _versions(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in (folder / _ROSTERS).glob("*.json") if path.stem.isdecimal())


def installed(folder: Path) -> SignedRoster | None:
    """The roster in force, its whole history verified again; None where there is none yet."""
    history = _verified_history(folder)
    return history[-1] if history else None


def _verified_history(folder: Path) -> list[SignedRoster]:
    history = _history(folder)
    if history:
        enrollment.verify_history(history)
    return history


def _history(folder: Path) -> list[SignedRoster]:
    return [load_document(folder / _ROSTERS / f"{version}.json", SignedRoster) for version in _versions(folder)]


def roster_files(folder: Path, version: int) -> dict[str, bytes]:
    """The installed rosters up to a version, by the names of their files: for whoever is to verify them elsewhere."""
    paths = (folder / _ROSTERS / f"{number}.json" for number in _versions(folder) if number <= version)
    return {path.name: _read(path) for path in paths}


def load_roster(folder: Path) -> Roster:
    """The roster in force, in which this organisation stands under its own keys; the caller still owes its expiry."""
    signed = installed(folder)
    if signed is None:
        raise EnvironmentUnfitError(
            f"{folder}: no roster is installed", hint="mpctf-secure enroll verify ROSTER.json …"
        )
    mine(folder, signed)
    check_mine(folder, signed.roster)
    return view(signed.roster)


def load_roster_of(folder: Path, roster_hash: bytes) -> Roster:
    """The installed roster with this hash, in force or not: the one that a run began with."""
    for roster in all_rosters(folder):
        if roster.hash == roster_hash:
            return roster
    raise EnvironmentUnfitError(f"{folder}: the roster {roster_hash.hex()[:16]}… of this run is not here", hint=_HINT)


def all_rosters(folder: Path) -> list[Roster]:
    """Every installed roster, in force or not."""
    return [view(signed.roster) for signed in _verified_history(folder)]


def install(folder: Path, rosters: Iterable[SignedRoster]) -> Roster:
    """Verify the next roster (a newcomer: with the one before it) and keep it; from now on no older one is accepted.

    What is installed already is no error. Where a roster gives this organisation another identity, the keys of the old
    one are unlinked.
    """
    history, name = _history(folder), organisation(folder).name
    fresh = []
    for signed in sorted(rosters, key=lambda one: one.roster.version):
        if any(one.roster.hash == signed.roster.hash for one in history):
            continue
        if history and signed.roster.version <= history[-1].roster.version:
            raise SecurityError(
                f"roster: version {signed.roster.version} is a way back: another one, or a later one, is installed"
            )
        history.append(signed)
        fresh.append(signed)
    if not history:
        raise UsageError("no roster to install", hint="mpctf-secure enroll verify roster-1.json *.signature.json")
    enrollment.verify_history(history)
    latest = history[-1].roster
    if history == fresh:
        enrollment.verify_arrival(history, {one.hex() for one in identities(folder)})
    check_mine(folder, latest)
    files.make_folder(folder / _ROSTERS)
    for signed in fresh:
        # At once and whole: a run that is on looks here every second.
        files.replace(folder / _ROSTERS / f"{signed.roster.version}.json", signed.encode())
    in_force = [m.identity for m in latest.members if m.name == name]
    for before in history[:-1]:
        for member in before.roster.members:
            if member.name == name and in_force and member.identity not in in_force:
                _sealed(folder, bytes.fromhex(member.identity)).unlink(missing_ok=True)
    return view(latest)


def check_mine(folder: Path, roster: RosterBody) -> None:
    """Refuse a roster in which somebody else's keys stand under this organisation's name.

    All would hear the same words, and whoever made that request would be this organisation to all of them.
    """
    name, held = organisation(folder).name, {one.hex() for one in identities(folder)}
    for member in roster.members:
        if member.name == name and member.identity not in held:
            raise SecurityError(
                f"the request under your name, {name}, is not yours: its identity is {member.identity[:16]}…",
                hint="somebody changed it on its way; give the others your own file by another way",
                culprits=[name],
            )


def heard(folder: Path, roster_hash: str) -> tuple[str, ...]:
    """From whom this roster's words were heard."""
    comparison = _comparison(folder)
    return comparison.heard if comparison and comparison.roster == roster_hash else ()


def note_heard(folder: Path, roster_hash: str, names: Iterable[str]) -> None:
    """Keep that these organisations' words for this roster were right; those for other rosters are forgotten."""
    everybody = sorted({*heard(folder, roster_hash), *names})
    files.replace(folder / _COMPARED, Comparison(roster=roster_hash, heard=tuple(everybody)).encode())


def _comparison(folder: Path) -> Comparison | None:
    return load_document(folder / _COMPARED, Comparison) if (folder / _COMPARED).exists() else None


def keep_vote(folder: Path, version: int, vote: Vote) -> None:
    """Put a vote on disk before it leaves; SecurityError for one about another roster of the same version.

    Two rosters of one version could otherwise both gather enough signatures, and the members part in two.
    """
    path = folder / _VOTES / f"{version}.json"
    files.make_folder(path.parent)
    try:
        files.create(path, vote.encode())
    except FileExistsError as error:
        if load_document(path, Vote).roster != vote.roster:
            raise SecurityError(
                f"this organisation has signed another roster of version {version}",
                hint=f"agree with the others which one is void; then remove {path}",
            ) from error


def destroy(folder: Path) -> None:
    """Unlink the private keys; what the disk keeps of deleted files is not in our hands."""
    for path in (*folder.glob("*" + _SEALED), *(folder / _ROUNDS).glob("*.key")):
        path.unlink(missing_ok=True)


def run_secret(folder: Path, run_id: str) -> bytes:
    """The site's 32-byte secret of one run, drawn when it is first asked for."""
    name = run_id + _RUN_SUFFIX
    if not _round_key(folder, name).exists():
        create_round_key(folder, name)
    return load_round_key(folder, name)


def destroy_run_secret(folder: Path, run_id: str) -> None:
    """Unlink it. That rounds of the run were joined stays known."""
    destroy_round_key(folder, run_id + _RUN_SUFFIX)


def joined_round(folder: Path, run_id: str) -> int:
    """The highest round of a run that this site ever joined, 0 before the first."""
    path = folder / _ROUNDS / (run_id + _JOINED)
    try:
        return int(path.read_bytes())
    except FileNotFoundError:
        return 0
    except ValueError as error:
        raise EnvironmentUnfitError(f"{path}: not a round's number", hint="restore the file") from error


def note_joined(folder: Path, run_id: str, number: int) -> None:
    """From now on this round counts as joined: its key may be lost, but not made again."""
    files.replace(folder / _ROUNDS / (run_id + _JOINED), str(number).encode())


def has_run_secret(folder: Path, run_id: str) -> bool:
    """Whether this site ever took part in a run that it has not closed."""
    return _round_key(folder, run_id + _RUN_SUFFIX).exists()


def create_round_key(folder: Path, name: str) -> None:
    """A fresh 32-byte key for the sealed file of one round."""
    files.make_folder(folder / _ROUNDS)
    files.create(_round_key(folder, name), os.urandom(KEY_BYTES))


def load_round_key(folder: Path, name: str) -> bytes:
    """The key of a round that is not closed; EnvironmentUnfitError where there is none."""
    path = _round_key(folder, name)
    with _naming(path):
        key = _read_private(path)
        if len(key) != KEY_BYTES:
            raise DecodeError(f"{len(key)} bytes instead of {KEY_BYTES}")
        return key


def destroy_round_key(folder: Path, name: str) -> None:
    """Unlink it: nobody reads the round's sealed file again, as far as file systems delete."""
    _round_key(folder, name).unlink(missing_ok=True)


def destroy_round_keys(folder: Path, run_id: str, last: int) -> None:
    """Unlink the keys of all rounds of a run up to this one, which a crash may have left."""
    for path in (folder / _ROUNDS).glob(f"{run_id}.*.key"):
        number = path.name.removeprefix(f"{run_id}.").removesuffix(".key")
        if number.isdecimal() and int(number) <= last:
            path.unlink(missing_ok=True)


def _round_key(folder: Path, name: str) -> Path:
    return folder / _ROUNDS / f"{name}.key"


def _sealed(folder: Path, identity: bytes) -> Path:
    return folder / (identity.hex() + _SEALED)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except SecurityError as error:
        raise type(error)(f"{path}: {error.message}", hint=error.hint) from error


def _read_private(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            content = stream.read(MOST_BYTES)
    except OSError as error:
        raise EnvironmentUnfitError(f"{path}: {error.strerror}", hint=_HINT) from error
    if mode & 0o077:
        raise SecurityError(f"mode {mode:04o} lets others read a private key", hint=f"chmod 600 {path}")
    return content
