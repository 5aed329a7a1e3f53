"""The roster: who is in, under which keys, signed by everyone in it. Pure: bytes in, bytes out.

The file is JSON; what is hashed and signed is the canonical encoding of its fields, so white space does not count.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat import signature
from mpctf_secure.hazmat.encoding import enc, enc_sequence
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import certificate
from mpctf_secure.ids import NAME, IdentityKey, ParticipantName

Role = Literal["coordinator", "participant"]


@dataclass(frozen=True)
class Member:
    """One organisation: its name, role, identity key and TLS certificate (DER)."""

    name: ParticipantName
    role: Role
    identity: IdentityKey
    certificate: bytes

    def encode(self) -> bytes:
        """The bytes that enter the roster's hash."""
        return enc(self.name, self.role, self.identity, self.certificate)


@dataclass(frozen=True)
class Roster:
    """All members by name, and everyone's signature over the hash."""

    version: int
    members: tuple[Member, ...]
    signatures: Mapping[str, bytes]

    @property
    def hash(self) -> bytes:
        """32 bytes that enter the contract and every protocol message."""
        return sha256(enc("mpctf-secure/roster/v1", self.version) + enc_sequence(m.encode() for m in self.members))

    @property
    def coordinator(self) -> Member:
        """The one member with that role."""
        return next(member for member in self.members if member.role == "coordinator")

    @property
    def participants(self) -> tuple[Member, ...]:
        """All others, by name."""
        return tuple(member for member in self.members if member.role == "participant")

    def by_identity(self, identity: bytes) -> Member:
        """The member with an identity key; SecurityError for a stranger's."""
        for member in self.members:
            if member.identity == identity:
                return member
        raise SecurityError("identity key is not in the roster", culprits=[identity.hex()])

    def by_spki(self, spki: bytes) -> Member:
        """The member with a TLS key, given as SHA-256 of the SPKI; never by a name in the certificate."""
        for member in self.members:
            if certificate.spki_hash(member.certificate) == spki:
                return member
        raise SecurityError("TLS key is not in the roster")

    def named(self, identities: Iterable[str]) -> list[str]:
        """Names for identity keys in hex, for messages to people; what is no member's key stays as it is."""
        names = {member.identity.hex(): str(member.name) for member in self.members}
        return [names.get(identity, identity) for identity in identities]

    def signed_by(self, name: ParticipantName, key: SigningKey) -> Self:
        """The roster with one more signature."""
        return replace(self, signatures={**self.signatures, name: key.sign(_to_sign(self.hash))})

    def to_json(self) -> str:
        """The file's text."""
        members = [
            {
                "name": member.name,
                "role": member.role,
                "identity": member.identity.hex(),
                "certificate": base64.b64encode(member.certificate).decode(),
            }
            for member in self.members
        ]
        signatures = {name: value.hex() for name, value in self.signatures.items()}
        return json.dumps({"version": self.version, "members": members, "signatures": signatures}, indent=2) + "\n"


def parse(text: str) -> Roster:
    """The verified roster in a file's text; SecurityError says what is wrong with it."""
    try:
        content = json.loads(text)
        members = tuple(_member(item) for item in content["members"])
        signatures = {str(name): bytes.fromhex(value) for name, value in content["signatures"].items()}
        roster = Roster(int(content["version"]), members, signatures)
        if not 1 <= roster.version < 1 << 32:
            raise ValueError("version is out of range")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise SecurityError("roster cannot be parsed", hint="get the file again from the coordinator") from error
    verify(roster)
    return roster


def _member(item: Mapping[str, Any]) -> Member:
    role = item["role"]
    if role not in get_args(Role):
        raise ValueError(f"unknown role {role!r}")
    return Member(
        ParticipantName(str(item["name"])),
        role,
        IdentityKey(bytes.fromhex(item["identity"])),
        base64.b64decode(item["certificate"], validate=True),
    )


def verify(roster: Roster) -> None:
    """1. names are well formed, ascending and unique; 2. one coordinator; 3. keys are good and nobody shares one;
    4. every member signed. The caller still owes: is this the roster whose words were compared?
    """
    names = [str(member.name) for member in roster.members]
    if names != sorted(set(names)) or not all(map(NAME.fullmatch, names)):
        raise SecurityError("roster: names are not well formed, ascending and unique")
    if [member.role for member in roster.members].count("coordinator") != 1:
        raise SecurityError("roster: there is not exactly one coordinator")
    for member in roster.members:
        _verify_member(roster, member)
    for keys in ({m.identity for m in roster.members}, {certificate.spki_hash(m.certificate) for m in roster.members}):
        if len(keys) != len(names):
            raise SecurityError("roster: two members share a key")


def _verify_member(roster: Roster, member: Member) -> None:
    if member.name not in roster.signatures:
        raise SecurityError(f"roster: {member.name} has not signed", culprits=[member.name])
    try:
        signature.check_public_key(member.identity)
        signature.verify(member.identity, _to_sign(roster.hash), roster.signatures[member.name])
        certificate.spki_hash(member.certificate)
    except SecurityError as error:
        raise SecurityError(f"roster: {member.name}: {error.message}", culprits=[member.name]) from error


def _to_sign(roster_hash: bytes) -> bytes:
    return enc("mpctf-secure/roster-signature/v1", roster_hash)
