"""A participant in the attempts of one round: a crash at any instant repeats nothing that may happen once only.

Rules of this file:
- What a message of mine depends on (input, entropy, the server's messages) is in the round's sealed file before the
  message is returned. After a crash the file's entries go through the same calls again and give the same bytes.
- One input for each event of an attempt: the same again gets the same answer, another is refused.
- A new attempt needs a higher number, a cohort within the last one's, and that nothing was released in the round.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from mpctf_secure.errors import COORDINATOR, SecurityError
from mpctf_secure.hazmat.encoding import Reader, enc
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.ids import IdentityKey
from mpctf_secure.parallel import ordered_map
from mpctf_secure.participant.round_file import Entry, RoundFile
from mpctf_secure.rounds.messages import Announce
from mpctf_secure.secagg.chunks import Lanes, digest
from mpctf_secure.secagg.client import Client, entropy_bytes
from mpctf_secure.secagg.masks import MaskedInput
from mpctf_secure.secagg.messages import Survivors
from mpctf_secure.secagg.parameters import Context

Input = tuple[Lanes, Lanes]
"""Quantised lanes [d], and scalars."""

_INPUT, _MORE_INPUT, _ATTEMPT = "input", "more input", "attempt"


class Attempts:
    """One round of one site. `context_of` derives an announced attempt's context or refuses the announcement."""

    def __init__(self, file: RoundFile, key: SigningKey, context_of: Callable[[Announce], Context]) -> None:
        self.announce: Announce | None = None
        """The last attempt that this site joined."""
        self._file = file
        self._key = key
        self._context_of = context_of
        self._chunks: list[bytes] = []
        self._input: Input | None = None
        self._client: Client | None = None
        self._done: dict[str, tuple[bytes, Any]] = {}  # in the attempt: event → what it took, what it gave
        for entry in file.entries:
            self._replay(entry)

    @property
    def released(self) -> bool:
        """Whether shares were released, which happens in one attempt of a round only, its last one."""
        return "release" in self._done

    @property
    def confirmed(self) -> tuple[IdentityKey, ...] | None:
        """The survivors in the tuple that this site signed in its last attempt, if it signed one."""
        return Survivors.decode(self._done["confirm"][0]).survivors if "confirm" in self._done else None

    @property
    def content(self) -> bytes:
        """The hash of what this site has put into the round, the same in all its attempts."""
        if self._input is None:
            raise SecurityError("a round without input")
        total = hashlib.sha256()
        for part in self._input:
            total.update(part.data)
        return total.digest()

    def secret(self, label: str) -> bytes:
        """32 bytes for a purpose that nobody can compute any more once the round is over."""
        return self._file.derive(label)

    def close(self) -> None:
        """The round is over: what it was sealed with goes."""
        self._file.close()

    def join(self, announce: Announce, make_input: Callable[[Context], Input]) -> bytes:
        """The signed advert for an attempt. The input is made once in a round, for the first attempt that is joined."""
        if announce != self.announce:
            context = self._context_of(announce)
            self._check_follows(context)
            if IdentityKey(self._key.public) not in announce.cohort:
                raise SecurityError("announced cohort leaves this site out", culprits=[COORDINATOR])
            entries = [] if self._input else self._keep_input(context, make_input(context))
            entropy = os.urandom(entropy_bytes(context.threshold))
            self._file.append(*entries, Entry(_ATTEMPT, enc(announce.encode(), entropy)))
            self._begin(announce, context, entropy)
        return bytes(self._done["advertise"][1])

    def share(self, adverts: bytes) -> bytes:
        """See `Client.share`."""
        return bytes(self._step("share", adverts))

    def mask(self, delivery: bytes) -> MaskedInput:
        """See `Client.mask`."""
        masked: MaskedInput = self._step("mask", delivery)
        return masked

    def complain(self, dealer: IdentityKey) -> bytes:
        """See `Client.complain`. Nothing depends on it, so nothing is kept."""
        if self._client is None:
            raise SecurityError("complaint before any attempt was joined")
        return self._client.complain(dealer)

    def declare(self, digest: bytes) -> bytes:
        """See `Client.declare`."""
        return bytes(self._step("declare", digest))

    def confirm(self, survivors: bytes) -> bytes:
        """See `Client.confirm`."""
        return bytes(self._step("confirm", survivors))

    def release(self, signatures: bytes) -> bytes:
        """See `Client.release`."""
        return bytes(self._step("release", signatures))

    def _step(self, event: str, message: bytes) -> Any:
        if event not in self._done:
            answer = self._perform(event, message)
            self._file.append(Entry(event, message))
            self._done[event] = message, answer
        taken, answer = self._done[event]
        if message != taken:
            raise SecurityError(f"a second, different message to {event} in one attempt", culprits=[COORDINATOR])
        return answer

    def _perform(self, event: str, message: bytes) -> Any:
        if self._client is None or self._input is None:
            raise SecurityError(f"{event} before any attempt was joined")
        if event == "mask":
            return self._client.mask(message, *self._input)
        return getattr(self._client, event)(message)

    def _check_follows(self, context: Context) -> None:
        if self._client is None:
            return
        if self.released:
            # Two openings of one round would give away the difference of two sums.
            raise SecurityError("another attempt after a release in the round", culprits=[COORDINATOR])
        if self._client.context.retry(context.attempt, context.cohort) != context:
            raise SecurityError("another attempt with other terms than the last", culprits=[COORDINATOR])

    def _keep_input(self, context: Context, made: Input) -> list[Entry]:
        self._input = made
        count = len(context.layout.sizes)
        pieces = [context.layout.cut(k, *made).data.cast("B") for k in range(count)]
        return [Entry(_MORE_INPUT if k else _INPUT, piece) for k, piece in enumerate(pieces)]

    def _begin(self, announce: Announce, context: Context, entropy: bytes) -> None:
        self._client = Client(context, self._key, entropy)
        self.announce = announce
        self._done = {"advertise": (b"", self._client.advertise())}

    def _replay(self, entry: Entry) -> None:
        content = bytes(entry.content)
        if entry.kind == _INPUT:
            # A crash may have cut an earlier writing short: what counts is the last one.
            self._chunks = [content]
        elif entry.kind == _MORE_INPUT:
            self._chunks.append(content)
        elif entry.kind == _ATTEMPT:
            reader = Reader(content)
            announce, entropy = Announce.decode(reader.bytes()), reader.bytes()
            context = self._context_of(announce)
            self._input = self._input or context.layout.join(self._chunks)
            self._begin(announce, context, entropy)
        else:
            self._done[entry.kind] = content, self._perform(entry.kind, content)


def uploader(
    attempts: Attempts, ctx: bytes, masked: MaskedInput, note: Callable[[bytes], None]
) -> Callable[[int], Iterator[bytes]]:
    """Gives ctx, length and number of the first chunk, the chunks from there on, then the signed digest of all.

    `note` gets the digest before that.

    However often it is called, these are parts of the same bytes. A chunk travels while the next ones are masked.
    """
    count, hashes = len(masked.layout.sizes), dict[int, bytes]()

    def hashed(number: int) -> tuple[int, bytes, bytes]:
        chunk = masked.chunk(number)
        return number, chunk, sha256(chunk)

    def pieces(first: int) -> Iterator[bytes]:
        """The upload from chunk number `first` on."""
        yield enc(ctx, masked.layout.size, first)
        due = [number for number in range(count) if number >= first or number not in hashes]
        for number, chunk, chunk_hash in ordered_map(hashed, due):
            hashes[number] = chunk_hash
            if number >= first:
                yield chunk
        total = digest(hashes[number] for number in range(count))
        note(total)
        yield attempts.declare(total)

    return pieces
