"""An organisation's own audit log, for commands that have its keys folder."""

from pathlib import Path

from mpctf_secure.auditlog.own import OwnLog, current_key
from mpctf_secure.identity import keystore
from mpctf_secure.identity.keys import Keys
from mpctf_secure.identity.roster import Roster
from mpctf_secure.transport.tls import utc_now


def open_own_log(folder: Path, keys: Keys) -> OwnLog:
    """With the keys in force, which are open: all that is there is signed."""
    own = OwnLog(folder, keystore.organisation(folder).name, keys.identity.public, keys.log.public, utc_now)
    own.sign(keys.log)
    return own


def own_log_of(folder: Path, roster: Roster) -> OwnLog:
    """With the keys that a roster gives this organisation; they stay sealed."""
    name = keystore.organisation(folder).name
    me = next(member for member in roster.members if member.name == name)
    return OwnLog(folder, name, me.identity, me.log, utc_now)


def own_log_so_far(folder: Path, keys: Keys) -> OwnLog:
    """The one that is written, whoever's keys these are: of a rotation there are two; with none yet, under these."""
    current = current_key(folder)
    public = current.public if current else keys.log.public
    return OwnLog(folder, keystore.organisation(folder).name, keys.identity.public, public, utc_now)
