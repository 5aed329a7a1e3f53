"""A leaf as bytes: its event and its time as one canonical JSON object (RFC 8785)."""

import datetime
import functools
import json
from dataclasses import dataclass
from typing import Annotated, Any

import rfc8785
from pydantic import Field, TypeAdapter, ValidationError

from mpctf_secure.auditlog.events import Leaf
from mpctf_secure.errors import DecodeError

MOST_BYTES = 1 << 17
"""Of a leaf; one that names a hundred participants three times has a sixth of that."""
Kinds = Any
"""OfRun or OfOrganisation: what a log may hold."""


@dataclass(frozen=True)
class Entry:
    """What happened, and when by its writer's clock, UTC, in milliseconds."""

    event: Leaf
    time: datetime.datetime

    @classmethod
    def decode(cls, data: bytes, kinds: Kinds) -> "Entry":
        """Parse; DecodeError for anything that `encode` would not have written."""
        if len(data) > MOST_BYTES:
            raise DecodeError(f"leaf of more than {MOST_BYTES} bytes")
        try:
            fields = json.loads(data)
            time = datetime.datetime.fromisoformat(fields.pop("time"))
            entry = cls(_adapter(kinds).validate_python(fields, strict=False), time)
            canonical = time.tzinfo == datetime.UTC and entry.encode() == data
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise DecodeError(
                f"leaf cannot be parsed: {where}: {first['msg']}",
                hint="was it written by another version of the program?",
            ) from error
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise DecodeError("leaf cannot be parsed") from error
        if not canonical:  # two readers could see two events
            raise DecodeError("leaf is not in canonical form")
        return entry

    def encode(self) -> bytes:
        """The leaf's bytes; no line end is in them."""
        return rfc8785.dumps({**self.event.model_dump(mode="json"), "time": to_text(self.time)})


def to_text(time: datetime.datetime) -> str:
    """As leaves write it."""
    return time.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@functools.cache
def _adapter(kinds: Kinds) -> TypeAdapter[Leaf]:
    return TypeAdapter(Annotated[kinds, Field(discriminator="kind")])
