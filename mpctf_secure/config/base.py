"""What all config models share."""

import json
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpctf_secure.errors import DecodeError

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""32 bytes, such as a hash or a key."""


class Frozen(BaseModel):
    """Immutable, and an unknown key is an error: a misspelt setting must never be ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Wire(Frozen):
    """A model that travels, and of which hashes are taken: as canonical JSON, sorted keys and no white space."""

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse bytes from outside; DecodeError for anything else than this model."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise DecodeError(
                f"{cls.__name__.lower().strip('_')} cannot be parsed: {error.errors()[0]['msg']}"
            ) from error

    def encode(self) -> bytes:
        """Only what is set: a field that is None is left out."""
        content = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
