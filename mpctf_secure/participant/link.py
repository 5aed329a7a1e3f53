"""Signed talk with the coordinator: each message out is signed for its context, each answer is checked."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple, TypeVar

from mpctf_secure.errors import COORDINATOR, InterruptedRunError, SecurityError, blaming
from mpctf_secure.hazmat.encoding import Reader, enc
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity.roster import Member
from mpctf_secure.rounds.messages import Announce, Caught, Fetch, LogRequest, Position, Publication, Void
from mpctf_secure.rounds.state import State
from mpctf_secure.secagg.chunks import digest
from mpctf_secure.secagg.messages import Signed
from mpctf_secure.transport.client import Channel, NoConnectionError

SKIP = "skip"
T = TypeVar("T")


class Published(NamedTuple):
    """A sum in its chunks, and its header."""

    header: Publication
    chunks: list[bytes]


Outcome = Announce | Published | Void


class CaughtUp(NamedTuple):
    """What a coordinator says of the rounds that were missed."""

    state: State
    outcomes: list[bytes]
    certificate: bytes


class BehindError(Exception):
    """The round that was asked about is long over: the state has to be asked for."""


class Skipped(Exception):  # noqa: N818
    """The coordinator closed a stage without this participant; the round goes on without its update."""


class Link:
    """A channel with this participant's signing key at its end."""

    def __init__(self, channel: Channel, key: SigningKey, coordinator: Member) -> None:
        self._channel = channel
        self._key = key
        self._coordinator = coordinator
        self._ended: str | None = None

    def ask(self, label: str, ctx: bytes, body: bytes, expect: str, *, skippable: bool = False) -> bytes:
        """Sign and send; the body of the answer, which must carry the label `expect`."""
        message = Signed.make(label, ctx, self._key, body).encode()
        answer = self._call(lambda channel: channel.exchange(enc(label, ctx, message)))
        return self._check(answer, ctx, expect, skippable=skippable)

    def tell(self, label: str, ctx: bytes, body: bytes) -> None:
        """Sign and send what may get lost; only the end of the run is heeded."""
        message = Signed.make(label, ctx, self._key, body).encode()
        answer = self._call(lambda channel: channel.try_exchange(enc(label, ctx, message)))
        if answer is not None:
            self._check(answer, ctx, "noted")

    def send(self, label: str, message: bytes, ctx: bytes, expect: str) -> bytes:
        """Send a message of an attempt, signed already; label and ctx only say which stage it is for."""
        answer = self._call(lambda channel: channel.exchange(enc(label, ctx, message)))
        return self._check(answer, ctx, expect, skippable=True)

    def upload(self, pieces: Callable[[int], Iterable[bytes]], ctx: bytes, expect: str) -> bytes:
        """Stream a masked input from the chunk where it broke off before: `pieces` gets its number."""
        answer = self._call(lambda channel: channel.upload(lambda: pieces(self._held(ctx))))
        if Signed.decode(answer).label == "again":
            self._check(answer, ctx, "again")
            answer = self._call(lambda channel: channel.upload(lambda: pieces(0)))
        return self._check(answer, ctx, expect, skippable=True)

    def _call(self, call: Callable[[Channel], T]) -> T:
        self._check_going_on()
        try:
            return call(self._channel)
        except NoConnectionError:
            self._check_going_on()
            raise

    def _check_going_on(self) -> None:
        if self._ended is not None:
            raise InterruptedRunError(self._ended, hint="its operator knows more; join again for the next run")

    def _held(self, ctx: bytes) -> int:
        with blaming(COORDINATOR, "answer"), Reader(self.ask("offset", ctx, b"", "held")) as reader:
            return reader.integer()

    def fetch(self, ctx: bytes, request: Fetch, most_chunks: int) -> Outcome:
        """What became of a round: another attempt, its published sum with chunks as its header says, or nothing."""
        header, *chunks = self._download("fetch", ctx, request, 1 + most_chunks)
        outcome = self._decode_outcome(header, ctx)
        announce = outcome if isinstance(outcome, Announce) else outcome.announce
        if announce.round != request.position.round:
            raise SecurityError("answer is about another round", culprits=[COORDINATOR])
        if not isinstance(outcome, Publication):
            return outcome
        if digest(map(sha256, chunks)) != outcome.digest:
            raise SecurityError("published sum is not what its header says", culprits=[COORDINATOR])
        return Published(outcome, chunks)

    def log(self, ctx: bytes, request: LogRequest, most_pieces: int) -> tuple[bytes, bytes]:
        """A step's checkpoint, and the leaves of the run's log behind the first `request.size`, each with its end."""
        header, *pieces = self._download("log", ctx, request, 1 + most_pieces)
        return self._check(header, ctx, "log"), b"".join(pieces)

    def catch_up(self, ctx: bytes, position: Position, most: int) -> CaughtUp | None:
        """The last finished state and the outcomes that led to it, in `most` pieces at the most, unverified.

        None where mine is not older.
        """
        header, *pieces = self._download("behind", ctx, Fetch(position), 1 + most)
        with blaming(COORDINATOR, "state"):
            if Signed.decode(header).label == "current":
                self._check(header, ctx, "current")
                return None
            caught = Caught.decode(self._check(header, ctx, "state"))
            if len(pieces) < caught.outcomes:
                raise SecurityError("it is incomplete")
            state = State.decode(caught.header, b"".join(pieces[caught.outcomes :]))
        return CaughtUp(state, pieces[: caught.outcomes], caught.certificate)

    def _download(self, label: str, ctx: bytes, request: Fetch | LogRequest, most: int) -> list[bytes]:
        def asking(held: int) -> bytes:
            return Signed.make(label, ctx, self._key, replace(request, held=held).encode()).encode()

        return self._call(lambda channel: channel.download(asking, most))

    def _decode_outcome(self, header: bytes, ctx: bytes) -> Announce | Publication | Void:
        match label := Signed.decode(header).label:
            case "behind":
                self._check(header, ctx, label)
                raise BehindError
            case "announce":
                return Announce.decode(self._check(header, ctx, label))
            case "void":
                return Void.decode(self._check(header, ctx, label))
            case _:
                return Publication.decode(self._check(header, ctx, "publication"))

    def _check(self, answer: bytes, ctx: bytes, expect: str, *, skippable: bool = False) -> bytes:
        with blaming(COORDINATOR, "answer"):
            return self._checked(Signed.decode(answer), ctx, expect, skippable)

    def _checked(self, reply: Signed, ctx: bytes, expect: str, skippable: bool) -> bytes:
        if reply.sender != self._coordinator.identity:
            raise SecurityError("not signed by the coordinator")
        if reply.label == "abort":
            reply.verify("abort", ctx)
            self._ended = f"the coordinator ended the run: {reply.body.decode(errors='replace')}"
            self._channel.patience = 0.0  # another thread may wait for a coordinator that is gone by now
            self._check_going_on()
        if skippable and reply.label == SKIP:
            reply.verify(SKIP, ctx)
            raise Skipped
        reply.verify(expect, ctx)
        return reply.body
