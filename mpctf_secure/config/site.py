"""The site file: what a participant's operator writes, and what no coordinator may override."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from mpctf_secure.config.address import Address
from mpctf_secure.config.base import Frozen


class Policy(Frozen):
    """Floors of this site; a run below them is refused."""

    allow_pair: bool = False
    """Accept a run of two, in which each learns the other's update by subtraction."""
    smallest_sum: Annotated[int, Field(ge=2, le=100)] = 2
    """The fewest organisations whose updates may be opened as one sum; the protocol itself asks for 3 and for t."""
    size_step: Annotated[int, Field(ge=0, lt=2**20)] = 100
    """`max_volume` needs the number of this site's rows: it is told rounded up to a multiple; 0 refuses such runs."""


class Compute(Frozen):
    """Where and how this site trains; nobody else hears of it."""

    memory_gib: Annotated[float, Field(gt=0, le=2**20)] | None = None
    """For `memory_aware`: what this site weighs, instead of what is free where it trains."""


class SiteConfig(Frozen):
    """One participant."""

    coordinator: Address
    """Where to dial out to, as IP literal and port."""
    model: Path
    """Folder of the base model."""
    data: Path
    """JSONL with one conversation a line."""
    keys: Path = Path("keys")
    """This site's private keys and the roster."""
    work: Path = Path("work")
    """Logs of the training job, and what this site must still know of its runs after a crash."""
    patience: Annotated[float, Field(gt=0)] = 600
    """Seconds after which a coordinator that has never answered is given up."""
    compute: Compute = Compute()
    policy: Policy = Policy()
