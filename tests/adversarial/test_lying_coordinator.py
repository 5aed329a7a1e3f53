"""A participant's link against a coordinator that lies about the run: answers, contracts, publications."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest

from mpctf_secure.errors import InterruptedRunError, SecurityError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity.roster import Member
from mpctf_secure.ids import IdentityKey, ParticipantName
from mpctf_secure.participant.link import Link, Published, Skipped
from mpctf_secure.rounds.messages import Announce, Fetch, Position, Publication, Void
from mpctf_secure.secagg.chunks import digest
from mpctf_secure.secagg.messages import Signed

COORDINATOR, SITE, STRANGER = (SigningKey(bytes([i]) * 32) for i in (1, 2, 3))
CTX, OTHER = sha256(b"ctx"), sha256(b"other")
MEMBER = Member(ParticipantName("coordinator"), "coordinator", IdentityKey(COORDINATOR.public), COORDINATOR.public)
CHUNKS = [np.arange(6, dtype="<u4").tobytes(), np.arange(3, dtype="<u8").tobytes()]


class Scripted:
    """A channel whose other end says what the test wants."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = answers

    def exchange(self, request: bytes) -> bytes:
        return self.answers[0]

    def upload(self, pieces: Callable[[], Iterable[bytes]]) -> bytes:
        return self.answers[0]

    def download(self, request: Callable[[int], bytes], most: int) -> list[bytes]:
        return list(self.answers) or [b""]

    def try_exchange(self, request: bytes) -> bytes | None:
        return self.answers[0] if self.answers else None


def link(*answers: bytes) -> Link:
    return Link(Scripted(*answers), SITE, MEMBER)  # type: ignore[arg-type]


def answer(label: str, body: bytes = b"", ctx: bytes = CTX, key: SigningKey = COORDINATOR) -> bytes:
    return Signed.make(label, ctx, key, body).encode()


LIES = {
    "signed by somebody else": answer("adverts", key=STRANGER),
    "signed by the participant itself, reflected": answer("adverts", key=SITE),
    "of another context, replayed": answer("adverts", ctx=OTHER),
    "of another stage": answer("survivors"),
    "a skip of another round, replayed": answer("skip", ctx=OTHER),
    "an abort of another run, replayed": answer("abort", ctx=OTHER),
    "no message at all": b"\0\0\0\1",
    "nothing": b"",
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_answer_is_refused(lie: bytes) -> None:
    assert link(answer("adverts", b"yes")).ask("advert", CTX, b"", "adverts") == b"yes"
    with pytest.raises(SecurityError):
        link(lie).ask("advert", CTX, b"", "adverts")


def test_true_skip_and_abort_are_what_they_say() -> None:
    with pytest.raises(Skipped):
        link(answer("skip")).send("advert", b"", CTX, "adverts")
    with pytest.raises(InterruptedRunError, match="gone fishing"):
        link(answer("abort", b"gone fishing")).ask("advert", CTX, b"", "adverts")


def test_skip_outside_an_attempt_is_refused() -> None:
    """As an answer to progress it would end training in the middle and leave the next round its result."""
    with pytest.raises(SecurityError):
        link(answer("skip")).tell("progress", CTX, b"")
    with pytest.raises(SecurityError):
        link(answer("skip")).ask("transition", CTX, b"", "next")


def test_lost_progress_does_no_harm() -> None:
    link().tell("progress", CTX, b"")
    with pytest.raises(InterruptedRunError):
        link(answer("abort")).tell("progress", CTX, b"")


def publication(number: int = 2) -> bytes:
    header = Publication(Announce(number, 1, (), ()), (), digest(map(sha256, CHUNKS)))
    return answer("publication", header.encode())


PUBLICATIONS = {
    "other chunks than the header's digest": [publication(), CHUNKS[0], b"x" * 24],
    "a missing chunk": [publication(), CHUNKS[0]],
    "the sum of another round": [publication(1), *CHUNKS],
    "another attempt of another round": [answer("announce", Announce(1, 2, (), ()).encode())],
    "a void of another round": [answer("void", Void(Announce(1, 1, (), ()), "", b"").encode())],
    "an abort that somebody else signed": [answer("abort", key=STRANGER)],
    "a stage's answer": [answer("adverts")],
    "no header": CHUNKS,
    "nothing": [],
}


@pytest.mark.parametrize("pieces", PUBLICATIONS.values(), ids=PUBLICATIONS.keys())
def test_published_sum_is_refused(pieces: list[bytes]) -> None:
    request = Fetch(Position(2, bytes(32)), 0)
    honest = link(publication(), *CHUNKS).fetch(CTX, request, 2)
    assert isinstance(honest, Published)
    assert honest.chunks == CHUNKS
    with pytest.raises(SecurityError):
        link(*pieces).fetch(CTX, request, 2)
