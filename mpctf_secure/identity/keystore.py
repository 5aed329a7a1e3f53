"""The only file that touches a keys/ folder: private keys in files of mode 0600, and the roster.

The keys lie unsealed, protected by file modes alone.
"""

import datetime
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from mpctf_secure import files
from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.signature import KEY_BYTES, SigningKey
from mpctf_secure.identity import certificate, roster
from mpctf_secure.identity.roster import Member, Role, Roster
from mpctf_secure.ids import IdentityKey, ParticipantName

_IDENTITY, _TLS_KEY, _TLS_CERTIFICATE, _ROSTER = "identity.key", "tls.key", "tls.crt", "roster.json"
_ROUNDS = "rounds"
_RUN_SUFFIX = ".run"  # a dot is in no run's name, so no round of another run has this file


@dataclass(frozen=True)
class Keys:
    """One member's private keys; the repr hides them."""

    identity: SigningKey
    tls_key_pem: bytes
    tls_certificate: bytes  # DER

    def __repr__(self) -> str:
        return f"Keys({self.identity!r})"

    def member(self, name: ParticipantName, role: Role) -> Member:
        """The public half, as the roster holds it."""
        return Member(name, role, IdentityKey(self.identity.public), self.tls_certificate)


def create(folder: Path, name: str, now: datetime.datetime) -> Keys:
    """Make fresh keys in a new folder of mode 0700; FileExistsError rather than replace any."""
    folder.mkdir(mode=0o700, parents=True)
    seed = os.urandom(KEY_BYTES)
    tls_key, tls_certificate = certificate.make(name, now)
    _write_private(folder / _IDENTITY, seed)
    _write_private(folder / _TLS_KEY, tls_key)
    (folder / _TLS_CERTIFICATE).write_bytes(certificate.to_pem(tls_certificate))
    return Keys(SigningKey(seed), tls_key, tls_certificate)


def load(folder: Path) -> Keys:
    """The keys in `folder`; SecurityError for files that others may read."""
    seed, tls_key = _read_private(folder / _IDENTITY), _read_private(folder / _TLS_KEY)
    if len(seed) != KEY_BYTES:
        raise SecurityError(f"{folder / _IDENTITY}: not an identity key of {KEY_BYTES} bytes")
    return Keys(SigningKey(seed), tls_key, certificate.from_pem(_read(folder / _TLS_CERTIFICATE)))


def save_roster(folder: Path, signed: Roster) -> None:
    """Put the roster beside the keys."""
    (folder / _ROSTER).write_text(signed.to_json(), encoding="utf-8")


def load_roster(folder: Path) -> Roster:
    """The verified roster beside the keys."""
    try:
        return roster.parse(_read(folder / _ROSTER).decode())
    except UnicodeDecodeError as error:
        raise SecurityError(f"{folder / _ROSTER}: not UTF-8") from error


def destroy(folder: Path) -> None:
    """Unlink the private keys; what the disk keeps of deleted files is not in our hands."""
    for path in (folder / _IDENTITY, folder / _TLS_KEY, *(folder / _ROUNDS).glob("*.key")):
        path.unlink(missing_ok=True)


def run_secret(folder: Path, run_id: str) -> bytes:
    """The site's 32-byte secret of one run, drawn when it is first asked for."""
    name = run_id + _RUN_SUFFIX
    if not _round_key(folder, name).exists():
        create_round_key(folder, name)
    return load_round_key(folder, name)


def destroy_run_secret(folder: Path, run_id: str) -> None:
    """Unlink it."""
    destroy_round_key(folder, run_id + _RUN_SUFFIX)


def create_round_key(folder: Path, name: str) -> None:
    """A fresh 32-byte key for the sealed file of one round."""
    (folder / _ROUNDS).mkdir(mode=0o700, exist_ok=True)
    _write_private(_round_key(folder, name), os.urandom(KEY_BYTES))


def load_round_key(folder: Path, name: str) -> bytes:
    """The key of a round that is not closed; EnvironmentUnfitError where there is none."""
    return _read_private(_round_key(folder, name))


def destroy_round_key(folder: Path, name: str) -> None:
    """Unlink it: nobody reads the round's sealed file again, as far as file systems delete."""
    _round_key(folder, name).unlink(missing_ok=True)


def _round_key(folder: Path, name: str) -> Path:
    return folder / _ROUNDS / f"{name}.key"


def _write_private(path: Path, content: bytes) -> None:
    files.create(path, content, 0o600)


def _read_private(path: Path) -> bytes:
    content = _read(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise SecurityError(f"{path}: mode {mode:04o} lets others read a private key", hint=f"chmod 600 {path}")
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EnvironmentUnfitError(
            f"{path}: {error.strerror}", hint="check the keys folder named in the site file"
        ) from error
