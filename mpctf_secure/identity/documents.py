"""The files of the ceremony: one JSON object each, in the one canonical form (RFC 8785) that can be hashed and signed.

Decoding is total: any bytes give a document or a SecurityError that says what is wrong.
"""

import datetime
from collections.abc import Mapping
from typing import Annotated, Literal, Self

import rfc8785
from pydantic import BaseModel, Field, ValidationError

from mpctf_secure.config.base import Frozen
from mpctf_secure.errors import DecodeError
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity.certificate import Role
from mpctf_secure.ids import NAME

MOST_BYTES = 1 << 20
_TIME = "%Y-%m-%dT%H:%M:%SZ"

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Hex32 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Hex64 = Annotated[str, Field(pattern="^[0-9a-f]{128}$")]
Base64 = Annotated[str, Field(pattern="^[A-Za-z0-9+/]+={0,2}$", max_length=4096)]
Time = Annotated[str, Field(pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]


class Document(Frozen):
    """What is common to all: the canonical form, its hash, what is signed."""

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse; DecodeError for what is too long, no such document, or not in canonical form."""
        if len(data) > MOST_BYTES:
            raise DecodeError(f"larger than {MOST_BYTES} bytes")
        try:
            document = cls.model_validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DecodeError(f"not a {cls.__name__.lower()}: {where + ': ' if where else ''}{first['msg']}") from error
        if document.encode() != data.rstrip(b"\r\n") + b"\n":
            # Duplicate keys, another order, white space: two readers could see two documents.
            raise DecodeError("not in canonical form", hint="get the file again, as an attachment")
        return document

    def encode(self) -> bytes:
        """The file's bytes."""
        return rfc8785.dumps(self.model_dump(mode="json")) + b"\n"

    @property
    def hash(self) -> bytes:
        """SHA-256 of the canonical form."""
        return sha256(self.encode().rstrip(b"\n"))


class Organisation(Document):
    """Whose keys a folder holds."""

    type: Literal["mpctf-secure/organisation/v1"] = "mpctf-secure/organisation/v1"
    name: Name
    role: Role


class Comparison(Document):
    """From whom the words of one roster were heard."""

    type: Literal["mpctf-secure/comparison/v1"] = "mpctf-secure/comparison/v1"
    roster: Hex32
    heard: tuple[Name, ...]


class Request(Document):
    """One organisation's wish to be a member: its public keys, and proofs that it holds the private ones."""

    type: Literal["mpctf-secure/request/v1"] = "mpctf-secure/request/v1"
    name: Name
    role: Role
    identity: Hex32
    box: Hex32
    log: Hex32
    authority: Base64
    """The identity's X.509 certificate, DER."""
    created: Time
    expires: Time
    nonce: Hex32
    package: Hex32
    """Hash of the program's files."""
    signatures: dict[str, Hex64]
    """By `identity`, `box` and `log`."""

    def to_sign(self) -> bytes:
        """What each of the keys signs: everything but the signatures."""
        return enc(self.type, rfc8785.dumps(self.model_dump(mode="json", exclude={"signatures"})))


class RosterBody(Document):
    """Who is in, until when, and after which roster: what everybody compares and signs."""

    type: Literal["mpctf-secure/roster/v1"] = "mpctf-secure/roster/v1"
    version: Annotated[int, Field(ge=1, lt=1 << 31)]
    previous: Hex32 | None
    expires: Time
    members: Annotated[tuple[Request, ...], Field(max_length=101)]


class Vote(Document):
    """One member's signature of a roster, and whose words it heard before; the signer is an identity, not a name."""

    type: Literal["mpctf-secure/roster-signature/v1"] = "mpctf-secure/roster-signature/v1"
    roster: Hex32
    signer: Hex32
    heard: tuple[Name, ...]
    signature: Hex64

    def to_sign(self) -> bytes:
        """What the signer's identity signs."""
        return enc(self.type, bytes.fromhex(self.roster), bytes.fromhex(self.signer), *self.heard)


class SignedRoster(Document):
    """A roster with the signatures that make it valid."""

    type: Literal["mpctf-secure/signed-roster/v1"] = "mpctf-secure/signed-roster/v1"
    roster: RosterBody
    signatures: tuple[Vote, ...]


class _Typed(BaseModel):
    type: str


_KINDS: Mapping[str, type[Document]] = {
    kind.model_fields["type"].default: kind for kind in (Request, RosterBody, Vote, SignedRoster)
}


def decode_any(data: bytes) -> Document:
    """A file that organisations exchange, of whatever kind it says it is; DecodeError for anything else."""
    try:
        kind = _KINDS[_Typed.model_validate_json(data[: MOST_BYTES + 1]).type]
    except (ValidationError, KeyError) as error:
        raise DecodeError("not a file of the ceremony", hint="get it again, as an attachment") from error
    return kind.decode(data)


def to_time(moment: datetime.datetime) -> str:
    """As documents write it: UTC, whole seconds."""
    return moment.astimezone(datetime.UTC).strftime(_TIME)


def from_time(text: str) -> datetime.datetime:
    """The moment; DecodeError for a date that is none."""
    try:
        return datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC)
    except ValueError as error:
        raise DecodeError(f"{text} is no date") from error
