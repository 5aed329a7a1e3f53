"""Where a passphrase comes from: a file descriptor, a systemd credential or the terminal; never argv or environment."""

import getpass
import os
import sys
from pathlib import Path

from mpctf_secure.errors import UsageError

CREDENTIAL = "mpctf-secure-passphrase"
"""Name for systemd's LoadCredential= and LoadCredentialEncrypted=."""
_MOST_BYTES = 1024
_SHORTEST = 12


def read(descriptor: int | None, *, new: bool = False) -> bytes:
    """The passphrase; a `new` one may not be short, and a person types it twice."""
    phrase = _read(descriptor, twice=new)
    if new and len(phrase) < _SHORTEST:
        raise UsageError(f"passphrase is shorter than {_SHORTEST} bytes", hint="five random words are a good one")
    return phrase


def _read(descriptor: int | None, *, twice: bool) -> bytes:
    if descriptor is not None:
        return _line(_read_descriptor(descriptor), f"--passphrase-fd {descriptor}")
    folder = os.environ.get("CREDENTIALS_DIRECTORY")  # where systemd put it, not what it is
    if folder and (path := Path(folder) / CREDENTIAL).exists():
        return _line(path.read_bytes(), str(path))
    if not sys.stdin.isatty():
        raise UsageError(
            "no passphrase: standard input is no terminal",
            hint=f"--passphrase-fd N, or a systemd credential {CREDENTIAL}",
        )
    phrase = getpass.getpass("passphrase of the keys: ").encode()
    if twice and getpass.getpass("the same again: ").encode() != phrase:
        raise UsageError("the two passphrases differ", hint="try again; nothing was written")
    return _line(phrase, "the passphrase")


def _read_descriptor(descriptor: int) -> bytes:
    try:
        with os.fdopen(descriptor, "rb") as stream:
            return stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"--passphrase-fd {descriptor}: {error.strerror}", hint="for example --passphrase-fd 3 3< file"
        ) from error


def _line(content: bytes, where: str) -> bytes:
    phrase = content.removesuffix(b"\n")
    if not phrase or len(phrase) > _MOST_BYTES or b"\n" in phrase:
        raise UsageError(f"{where}: not 1 to {_MOST_BYTES} bytes", hint="one line, the passphrase alone")
    return phrase
