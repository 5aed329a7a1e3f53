"""The whole ceremony on one machine, for local participants: the steps that organisations otherwise take one by one."""

import datetime
import os
from collections.abc import Mapping
from pathlib import Path

from mpctf_secure.hazmat.passphrase import LIGHT
from mpctf_secure.identity import enrollment, keystore
from mpctf_secure.identity.certificate import Role
from mpctf_secure.identity.documents import Organisation
from mpctf_secure.identity.roster import Roster, view
from mpctf_secure.ids import ParticipantName

LIFE = datetime.timedelta(days=30)
NONCE_BYTES = 32


def hold(
    folders: Mapping[ParticipantName, Path],
    coordinator: ParticipantName,
    now: datetime.datetime,
    phrase: bytes,
    package: bytes = bytes(32),
) -> Roster:
    """Make keys in every member's folder, let all sign one roster and install it for each.

    `phrase` is random and lives as long as the run, so little is spent on stretching it.
    """
    roles: dict[str, Role] = {name: "coordinator" if name == coordinator else "participant" for name in sorted(folders)}
    keys = {
        name: keystore.create(folder, Organisation(name=name, role=roles[name]), phrase, LIGHT)
        for name, folder in sorted(folders.items())
    }
    body = enrollment.next_roster(
        None,
        [
            enrollment.make_request(held, name, roles[name], now, now + LIFE, os.urandom(NONCE_BYTES), package)
            for name, held in keys.items()
        ],
    )
    votes = [enrollment.vote(body, held, keys.keys() - {name}) for name, held in keys.items()]
    signed = enrollment.collect(body, votes)
    for folder in folders.values():
        keystore.install(folder, [signed])
    return view(body)
