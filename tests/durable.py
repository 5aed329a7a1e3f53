"""A participant whose round lies in a sealed file: in this process, or in a child that is killed at a chosen instant.

Both have the methods of `secagg.client.Client`, so that `simulator.Attempt` can run with them. Run as a program this is
the child: requests come as frames on stdin, answers go as frames to stdout.
"""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.ids import IdentityKey
from mpctf_secure.participant.attempts import Attempts
from mpctf_secure.participant.round_file import LostRoundError, RoundFile
from mpctf_secure.rounds.messages import Announce
from mpctf_secure.secagg.parameters import Context


def announcement(context: Context) -> Announce:
    return Announce(context.round, context.attempt, context.cohort, context.first_cohort)


def open_attempts(home: Path, key: SigningKey, first: Context) -> Attempts:
    """The round as it lies on disk; `first` is the context of attempt 1."""
    for folder in ("keys", "work"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    file = RoundFile(home / "work", home / "keys", first.run_id, first.contract_hash, first.round)

    def context_of(announce: Announce) -> Context:
        return first if announce.attempt == 1 else first.retry(announce.attempt, announce.cohort)

    return Attempts(file, key, context_of)


class DurableClient:
    """One attempt of a participant; made anew from the same folder it is the participant after a crash."""

    def __init__(self, home: Path, key: SigningKey, context: Context, made: Any, first: Context | None = None) -> None:
        self.attempts = open_attempts(home, key, first or context)
        self.key, self.me = key, IdentityKey(key.public)
        self._context, self._made = context, made

    def advertise(self) -> bytes:
        return self.attempts.join(announcement(self._context), lambda _: self._made)

    def share(self, adverts: bytes) -> bytes:
        return self.attempts.share(adverts)

    def mask(self, delivery: bytes, *_: object) -> Any:
        return self.attempts.mask(delivery)

    def declare(self, digest: bytes) -> bytes:
        return self.attempts.declare(digest)

    def confirm(self, survivors: bytes) -> bytes:
        return self.attempts.confirm(survivors)

    def release(self, signatures: bytes) -> bytes:
        return self.attempts.release(signatures)


class KilledClient:
    """A `DurableClient` in a child that kills itself before or after its `at`-th write to disk; then a new one.

    After the kill every message that the dead one took comes again, and must get the answer that it got then.
    """

    def __init__(self, home: Path, seed: bytes, context: Context, made: Any, at: int, when: str) -> None:
        self.me = IdentityKey(SigningKey(seed).public)
        self.killed = False
        self.answers: list[tuple[tuple[Any, ...], Any]] = []
        self._setup = (home, seed, context, made)
        self._child = self._start(at, when)

    def _start(self, at: int, when: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, __file__, str(at), when]
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        send(child.stdin, self._setup)
        return child

    def advertise(self) -> bytes:
        return self._call("advertise")

    def share(self, adverts: bytes) -> bytes:
        return self._call("share", adverts)

    def mask(self, delivery: bytes, *_: object) -> Any:
        return Chunks(self._call("mask", delivery))

    def declare(self, digest: bytes) -> bytes:
        return self._call("declare", digest)

    def confirm(self, survivors: bytes) -> bytes:
        return self._call("confirm", survivors)

    def release(self, signatures: bytes) -> bytes:
        return self._call("release", signatures)

    def close(self) -> None:
        self._child.stdin.close()
        self._child.stdout.close()
        self._child.kill()
        self._child.wait()

    def _call(self, event: str, *message: bytes) -> Any:
        answer = self._ask(event, *message)
        if answer is None:  # killed: the next process resends all that the dead one may have sent, then goes on
            assert not self.killed
            self.killed = self._child.wait() == -signal.SIGKILL
            assert self.killed
            self.close()
            self._child = self._start(-1, "never")
            for request, before in self.answers:
                assert self._ask(*request) == before, f"another answer to {request[0]} after the kill"
            answer = self._ask(event, *message)
        if isinstance(answer, LostRoundError):
            raise answer
        self.answers.append(((event, *message), answer))
        return answer

    def _ask(self, *request: Any) -> Any:
        try:
            send(self._child.stdin, request)
            return receive(self._child.stdout)
        except (BrokenPipeError, EOFError):
            return None


class Chunks:
    """The answer to `mask`, already read."""

    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks

    def chunks(self) -> list[bytes]:
        return self._chunks


def send(stream: BinaryIO | None, value: Any) -> None:
    assert stream is not None
    pickle.dump(value, stream)
    stream.flush()


def receive(stream: BinaryIO | None) -> Any:
    assert stream is not None
    return pickle.load(stream)  # noqa: S301


def kill_at(count: int, when: str) -> None:
    """Make this process kill itself before or after its `count`-th fsync."""
    real, done = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        mine = done[0] == count
        done[0] += 1
        if mine and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync


def main() -> None:
    home, seed, context, made = receive(sys.stdin.buffer)
    kill_at(int(sys.argv[1]), sys.argv[2])
    client: DurableClient | None = None
    while True:
        try:
            event, *message = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            client = client or DurableClient(home, SigningKey(seed), context, made)
            answer = getattr(client, event)(*message)
            send(sys.stdout.buffer, list(answer.chunks()) if event == "mask" else answer)
        except LostRoundError as error:
            send(sys.stdout.buffer, LostRoundError(error.message))


if __name__ == "__main__":
    main()
