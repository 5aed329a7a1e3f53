"""The files of the ceremony: one JSON object each, in the one canonical form (RFC 8785) that can be hashed and signed.

Decoding is total: any bytes give a document or a SecurityError that says what is wrong.
"""

import datetime
from collections.abc import Mapping
from typing import Annotated, Literal, Self

import rfc8785
from pydantic import BaseModel, FailFast, Field, ValidationError

from mpctf_secure.config.base import Frozen, Hex32
from mpctf_secure.errors import DecodeError
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity.certificate import Role
from mpctf_secure.ids import NAME

MOST_BYTES = 2 << 20
"""More than any document may have by the limits below, so whatever is signed can be written and read again."""
MOST_MEMBERS = 101
_AGAIN = "is it the right file? then get it again, as an attachment"
_TIME = "%Y-%m-%dT%H:%M:%SZ"

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
# The first bad item ends it: a stranger's file of a million bad ones would take gigabytes to complain of.
Names = Annotated[tuple[Name, ...], Field(max_length=MOST_MEMBERS), FailFast()]
Hex64 = Annotated[str, Field(pattern="^[0-9a-f]{128}$")]
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
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            what = f"{where}: {first['msg']}" if where else first["msg"]
            raise DecodeError(f"not a {_kind(cls)}: {what}", hint=_AGAIN) from error
        if document.encode() != data:
            # Duplicate keys, another order, white space: two readers could see two documents.
            raise DecodeError("not in canonical form", hint=_AGAIN)
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
    heard: Names


class Request(Document):
    """One organisation's wish to be a member: its public keys, and proofs that it holds the private ones."""

    type: Literal["mpctf-secure/request/v1"] = "mpctf-secure/request/v1"
    name: Name
    role: Role
    identity: Hex32
    box: Hex32
    log: Hex32
    created: Time
    expires: Time
    nonce: Hex32
    package: Hex32
    """Hash of the program's files."""
    signatures: Annotated[dict[str, Hex64], Field(max_length=3)]
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
    members: Annotated[tuple[Request, ...], Field(max_length=MOST_MEMBERS), FailFast()]


class Vote(Document):
    """One member's signature of a roster, and whose words it heard before; the signer is an identity, not a name."""

    type: Literal["mpctf-secure/roster-signature/v1"] = "mpctf-secure/roster-signature/v1"
    roster: Hex32
    signer: Hex32
    heard: Names
    signature: Hex64

    def to_sign(self) -> bytes:
        """What the signer's identity signs."""
        return enc(self.type, bytes.fromhex(self.roster), bytes.fromhex(self.signer), *self.heard)


class SignedRoster(Document):
    """A roster with the signatures that make it valid."""

    type: Literal["mpctf-secure/signed-roster/v1"] = "mpctf-secure/signed-roster/v1"
    roster: RosterBody
    signatures: Annotated[tuple[Vote, ...], Field(max_length=2 * MOST_MEMBERS), FailFast()]


class _Typed(BaseModel):
    type: str


_KINDS: Mapping[str, type[Document]] = {
    kind.model_fields["type"].default: kind for kind in (Request, RosterBody, Vote, SignedRoster)
}


def _kind(cls: type[Document]) -> str:
    """Its name as people see it, from mpctf-secure/NAME/v1."""
    return str(cls.model_fields["type"].default).split("/")[1].replace("-", " ")


def decode_any(data: bytes) -> Document:
    """A file that organisations exchange, of whatever kind it says it is; DecodeError for anything else."""
    try:
        kind = _KINDS[_Typed.model_validate_json(data[: MOST_BYTES + 1]).type]
    except (ValidationError, KeyError) as error:
        raise DecodeError("not a file of the ceremony", hint=_AGAIN) from error
    return kind.decode(data)


def to_time(moment: datetime.datetime) -> str:
    """As documents write it: UTC, whole seconds."""
    return moment.astimezone(datetime.UTC).strftime(_TIME)


def from_time(text: str) -> datetime.datetime:
    """The moment, of this or the next century; DecodeError for anything else."""
    try:
        moment = datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC)
    except ValueError as error:
        raise DecodeError(f"{text} is no date") from error
    if not 2000 <= moment.year < 2200:  # so that sums with days stay dates
        raise DecodeError(f"{text} is out of the years 2000 to 2199")
    return moment
