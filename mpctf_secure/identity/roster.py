"""The installed roster as the rest of the program sees it: who is who, under which key."""

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpctf_secure.errors import SecurityError
from mpctf_secure.identity.certificate import Role
from mpctf_secure.identity.documents import Request, RosterBody, from_time
from mpctf_secure.ids import IdentityKey, ParticipantName


@dataclass(frozen=True)
class Member:
    """One organisation: its name, role, and identity key, which issues its TLS certificates."""

    name: ParticipantName
    role: Role
    identity: IdentityKey
    log: bytes
    """32 bytes: the Ed25519 key that signs its audit log, and what it witnesses."""


@dataclass(frozen=True)
class Roster:
    """A verified roster."""

    version: int
    hash: bytes
    """32 bytes that enter the contract and every protocol message."""
    expires: datetime.datetime
    members: tuple[Member, ...]

    @property
    def coordinator(self) -> Member:
        """The one member with that role."""
        return next(member for member in self.members if member.role == "coordinator")

    @property
    def participants(self) -> tuple[Member, ...]:
        """All others, by name."""
        return tuple(member for member in self.members if member.role == "participant")

    @property
    def roles(self) -> Mapping[IdentityKey, Role]:
        """Every identity's role."""
        return {member.identity: member.role for member in self.members}

    def by_identity(self, identity: bytes) -> Member:
        """The member with an identity key; SecurityError for a stranger's."""
        for member in self.members:
            if member.identity == identity:
                return member
        raise SecurityError("identity key is not in the roster", culprits=[identity.hex()])

    def named(self, identities: Iterable[str]) -> list[str]:
        """Names for identity keys in hex, for messages to people; what is no member's key stays as it is."""
        names = {member.identity.hex(): str(member.name) for member in self.members}
        return [names.get(identity, identity) for identity in identities]

    def check_unexpired(self, now: datetime.datetime) -> None:
        """SecurityError from the day on which the first of its requests expires."""
        if now >= self.expires:
            raise SecurityError(
                f"roster version {self.version} expired on {self.expires:%Y-%m-%d}",
                hint="everybody: mpctf-secure enroll renew, and a next roster with the new requests",
            )


def as_member(request: Request) -> Member:
    """Who makes a request, as a roster has it."""
    identity, log = bytes.fromhex(request.identity), bytes.fromhex(request.log)
    return Member(ParticipantName(request.name), request.role, IdentityKey(identity), log)


def view(body: RosterBody) -> Roster:
    """What a verified roster says."""
    members = map(as_member, body.members)
    return Roster(body.version, body.hash, from_time(body.expires), tuple(members))
