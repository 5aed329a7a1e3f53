"""The two state machines as data: (state, event) → state. What is not in a table does not happen.

A participant signs one advert, makes one masked vector and releases for one survivor tuple in an attempt; the tables
are what forbids a second one. The events are the methods of `client.Client` and `server.Server`.
"""

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from mpctf_secure.errors import SecurityError


class ClientState(Enum):
    """How far a participant is in an attempt."""

    ANNOUNCED = "announced"
    ADVERTISED = "advertised"
    SHARED = "shared"
    MASKED = "masked"
    DECLARED = "declared"
    CONFIRMED = "confirmed"
    RELEASED = "released"


class ServerState(Enum):
    """Which messages the server collects."""

    ADVERTS = "advertise keys"
    SHARES = "share keys"
    UPLOADS = "masked input"
    CONSISTENCY = "consistency check"
    RELEASES = "unmask"
    OPENED = "opened"


CLIENT: Mapping[tuple[ClientState, str], ClientState] = {
    (ClientState.ANNOUNCED, "advertise"): ClientState.ADVERTISED,
    (ClientState.ADVERTISED, "share"): ClientState.SHARED,
    (ClientState.SHARED, "mask"): ClientState.MASKED,
    (ClientState.MASKED, "declare"): ClientState.DECLARED,
    (ClientState.DECLARED, "confirm"): ClientState.CONFIRMED,
    (ClientState.CONFIRMED, "release"): ClientState.RELEASED,
}

SERVER: Mapping[tuple[ServerState, str], ServerState] = {
    (ServerState.ADVERTS, "close_adverts"): ServerState.SHARES,
    (ServerState.SHARES, "close_shares"): ServerState.UPLOADS,
    (ServerState.UPLOADS, "close_uploads"): ServerState.CONSISTENCY,
    (ServerState.CONSISTENCY, "close_consistency"): ServerState.RELEASES,
    (ServerState.RELEASES, "close_releases"): ServerState.OPENED,
}

S = TypeVar("S", ClientState, ServerState)


def advance(table: Mapping[tuple[S, str], S], state: S, event: str) -> S:
    """The next state; SecurityError for an event out of turn, which is a second use of a one-time secret."""
    if (state, event) not in table:
        raise SecurityError(f"{event} is not possible in state {state.value}")
    return table[state, event]
