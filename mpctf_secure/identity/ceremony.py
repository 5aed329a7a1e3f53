"""An ephemeral ceremony on one machine: fresh keys for everyone and a roster that all of them sign."""

import datetime
from collections.abc import Mapping
from pathlib import Path

from mpctf_secure.identity import keystore
from mpctf_secure.identity.roster import Role, Roster, verify
from mpctf_secure.ids import ParticipantName


def hold(folders: Mapping[ParticipantName, Path], coordinator: ParticipantName, now: datetime.datetime) -> Roster:
    """Make keys in every member's folder, sign the roster with each and lay it beside the keys."""
    keys = {name: keystore.create(folder, name, now) for name, folder in sorted(folders.items())}
    roles: dict[ParticipantName, Role] = dict.fromkeys(keys, "participant")
    roles[coordinator] = "coordinator"
    roster = Roster(1, tuple(held.member(name, roles[name]) for name, held in keys.items()), {})
    for name, held in keys.items():
        roster = roster.signed_by(name, held.identity)
    verify(roster)
    for folder in folders.values():
        keystore.save_roster(folder, roster)
    return roster
