"""What all config models share."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Immutable, and an unknown key is an error: a misspelt setting must never be ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")
