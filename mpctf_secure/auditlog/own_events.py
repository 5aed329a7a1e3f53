"""What organisations' own logs tell: every kind of leaf, and the fields that may be in one."""

from typing import Literal

from mpctf_secure.auditlog.events import ClockSet, Count, Leaf, LogRecovered, Name, Names, Text
from mpctf_secure.config.base import Hex32


class LogBegun(Leaf):
    """The first leaf of an organisation's own log, and what the log before it ended with, if there was one."""

    ONCE = ()
    kind: Literal["log_begun"] = "log_begun"
    organisation: Name
    identity: Hex32
    previous: Text | None
    """Its origin."""
    size: Count
    root: Hex32 | None


class KeysOpened(Leaf):
    """The private keys were unsealed, for a command."""

    kind: Literal["keys_opened"] = "keys_opened"
    command: Text


class KeysDrawn(Leaf):
    """Fresh private keys beside those in force, which they follow once a roster has them."""

    kind: Literal["keys_drawn"] = "keys_drawn"
    identity: Hex32


class Requested(Leaf):
    """A request to be a member, for the first time or with another end: its hash as rosters have it."""

    kind: Literal["requested"] = "requested"
    request: Hex32
    expires: Text


class RosterSigned(Leaf):
    """This organisation has signed a roster, having heard the words of these."""

    kind: Literal["roster_signed"] = "roster_signed"
    version: Count
    roster: Hex32
    heard: Names


class RosterInstalled(Leaf):
    """From now on this roster is in force here."""

    kind: Literal["roster_installed"] = "roster_installed"
    version: Count
    roster: Hex32


class RunAccepted(Leaf):
    """This site takes part in a run, on the terms of its contract."""

    ONCE = ("run",)
    kind: Literal["run_accepted"] = "run_accepted"
    run: Name
    roster_hash: Hex32
    contract_hash: Hex32
    policy: Hex32
    """Hash of the site's policy: its floors, vetoes and budget."""


class RunRefused(Leaf):
    """This site takes no part in a run that it was asked to."""

    kind: Literal["run_refused"] = "run_refused"
    run: Name


class Joined(Leaf):
    """This site takes part in an attempt; nothing of it has left yet."""

    ONCE = ("run", "round", "attempt")
    kind: Literal["joined"] = "joined"
    run: Name
    round: Count
    attempt: Count
    context: Hex32
    cohort: Names


class Charged(Leaf):
    """What a round publishes of this site's rows is in its privacy ledger, of so many lines and this last hash."""

    ONCE = ("run", "round")
    kind: Literal["charged"] = "charged"
    run: Name
    round: Count
    charges: Count
    ledger: Hex32


class Uploaded(Leaf):
    """The last piece of a masked input is about to leave: the digest of all; null where it is not masked."""

    ONCE = ("run", "round", "attempt")
    kind: Literal["uploaded"] = "uploaded"
    run: Name
    round: Count
    attempt: Count
    digest: Hex32 | None


class Confirmed(Leaf):
    """This site is about to sign a tuple of survivors: the hash of what it signs, and who in it dropped out."""

    ONCE = ("run", "round", "attempt")
    kind: Literal["confirmed"] = "confirmed"
    run: Name
    round: Count
    attempt: Count
    tuple: Hex32
    recovered: Names


class Released(Leaf):
    """Shares are about to leave, with which the sum of that tuple, and no other, can be opened."""

    ONCE = ("run", "round")
    kind: Literal["released"] = "released"
    run: Name
    round: Count
    attempt: Count
    tuple: Hex32


class Heard(Leaf):
    """What was published of a round: of whose attempt, the sum's digest and whose inputs it holds.

    Of a void one null and nobody; `convicted` is then a dealer with a proof against it.
    """

    ONCE = ("run", "round")
    kind: Literal["heard"] = "heard"
    run: Name
    round: Count
    attempt: Count
    cohort: Names
    digest: Hex32 | None
    survivors: Names
    convicted: Name | None


class Cosigned(Leaf):
    """This site is about to cosign a checkpoint of a run's log.

    `head` commits to the first `own_size` leaves of this log: SHA-256(enc(`mpctf-secure/log-head/v1`, salt, number of
    leaves, their root)).
    """

    ONCE = ("run", "round")
    kind: Literal["cosigned"] = "cosigned"
    run: Name
    round: Count
    size: Count
    root: Hex32
    head: Hex32
    salt: Hex32
    own_size: Count


class RunDone(Leaf):
    """A run is over for this site, which has written its adapter: SHA-256 of adapter_model.safetensors."""

    ONCE = ("run",)
    kind: Literal["run_done"] = "run_done"
    run: Name
    adapter: Hex32


class RunKept(Leaf):
    """The coordinator's: a run has ended, and its log with so many leaves and this root."""

    ONCE = ("run",)
    kind: Literal["run_kept"] = "run_kept"
    run: Name
    size: Count
    root: Hex32
    exit_code: Count


class Pruned(Leaf):
    """An old log is about to be deleted here: what it ended with."""

    ONCE = ("origin",)
    kind: Literal["pruned"] = "pruned"
    origin: Text
    size: Count
    root: Hex32


OfOrganisation = (
    LogBegun
    | KeysOpened
    | KeysDrawn
    | Requested
    | RosterSigned
    | RosterInstalled
    | RunAccepted
    | RunRefused
    | Joined
    | Charged
    | Uploaded
    | Confirmed
    | Released
    | Heard
    | Cosigned
    | RunDone
    | RunKept
    | Pruned
    | ClockSet
    | LogRecovered
)
"""What an organisation's own log may hold."""
