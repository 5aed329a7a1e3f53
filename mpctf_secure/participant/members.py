"""Who is in a run, and who of them still is: a member may be removed while the run goes on."""

from collections.abc import Collection
from pathlib import Path

from mpctf_secure.identity import keystore
from mpctf_secure.identity.roster import Roster
from mpctf_secure.ids import IdentityKey


class Members:
    """The participants called `names` in `roster`, and those whom the newest roster installed in `keys` still has."""

    def __init__(self, keys: Path, roster: Roster, names: Collection[str]) -> None:
        self._keys = keys
        self._newest = roster
        self._all = {member for member in roster.participants if member.name in names}
        self.identities = frozenset(member.identity for member in self._all)
        """Of all whom the contract names."""

    def newest_roster(self) -> Roster:
        """As installed at this moment."""
        if keystore.latest_version(self._keys) > self._newest.version:
            self._newest = keystore.load_roster(self._keys)
        return self._newest

    def left(self) -> set[IdentityKey]:
        """Those who are in it under the same identity."""
        return {member.identity for member in self._all.intersection(self.newest_roster().participants)}

    def gone(self) -> list[str]:
        """Names of the others."""
        return sorted(str(member.name) for member in self._all.difference(self.newest_roster().participants))
