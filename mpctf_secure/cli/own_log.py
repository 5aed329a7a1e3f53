"""An organisation's own audit log, for commands that have its keys folder."""

from pathlib import Path

from mpctf_secure.auditlog.own import OwnLog
from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.identity import keystore
from mpctf_secure.identity.keys import Keys
from mpctf_secure.transport.tls import utc_now


def own_log(folder: Path, keys: Keys | None = None) -> OwnLog:
    """The log of the keys that the roster in force gives this organisation, or gave it last; they may stay sealed.

    `keys`: those to begin with where no roster is installed yet.
    """
    name = keystore.organisation(folder).name
    mine = [one for roster in keystore.all_rosters(folder) for one in roster.members if one.name == name]
    if mine:
        return OwnLog(folder, name, mine[-1].identity, mine[-1].log, utc_now)
    if keys is None:
        raise EnvironmentUnfitError(f"{folder}: no roster is installed", hint="mpctf-secure enroll verify")
    return OwnLog(folder, name, keys.identity.public, keys.log.public, utc_now)
