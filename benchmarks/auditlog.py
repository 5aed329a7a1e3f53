"""How fast an audit log takes events, and how fast a whole log is verified, beside what the disk and SHA-256 allow.

Usage: python benchmarks/auditlog.py [APPENDED [VERIFIED]]

Appending: the limit is the same lines, written and synced one by one, with a file replaced after each hundred.
Verifying: the limit is one SHA-256 for each leaf and each node above it. Proofs are counted in hashes, and timed.
"""

import datetime
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from secagg import machine

from mpctf_secure import files
from mpctf_secure.auditlog.entry import Entry
from mpctf_secure.auditlog.events import Dropout, Leaf, RunOpened
from mpctf_secure.auditlog.history import HistoryOfRun
from mpctf_secure.auditlog.note import Key
from mpctf_secure.auditlog.storage import LOG, Log, read_signed
from mpctf_secure.hazmat.signature import SigningKey

APPENDED, VERIFIED, EACH = 10_000, 1_000_000, 100
WRITER = SigningKey(bytes(32))
KEY = Key("registry-x/run/bench", WRITER.public)
BEGAN = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
NOTHING = "00" * 32


def events(count: int) -> Iterator[Leaf]:
    """As a run with very many dropouts has them."""
    yield RunOpened(run="bench", roster_version=1, roster_hash=NOTHING, package=NOTHING, participants=("hospital-a",))
    for number in range(1, count):
        yield Dropout(round=number, participant="hospital-a", stage="masked input")


def seconds(work: Callable[[], object]) -> float:
    """That it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def append(folder: Path, count: int) -> None:
    """The program's own way."""
    log = Log(folder, KEY, HistoryOfRun(), lambda: BEGAN)
    for number, event in enumerate(events(count), 1):
        log.append(event)
        if number % EACH == 0:
            log.sign(WRITER)


def append_raw(folder: Path, lines: list[bytes]) -> None:
    """The same bytes, as durable, and nothing else."""
    folder.mkdir()
    with (folder / LOG).open("ab", buffering=0) as stream:
        for number, line in enumerate(lines, 1):
            stream.write(line + b"\n")
            os.fsync(stream.fileno())
            if number % EACH == 0:
                files.replace(folder / "checkpoint", bytes(300))


def hash_raw(lines: list[bytes]) -> None:
    """A hash a leaf, and one a node."""
    for line in lines:
        hashlib.sha256(line).digest()
        hashlib.sha256(bytes(65)).digest()


def main() -> int:
    """Measure and print."""
    appended, verified = (int(given) for given in (*sys.argv[1:], *map(str, (APPENDED, VERIFIED)[len(sys.argv) - 1 :])))
    print(machine())
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        took = seconds(lambda: append(folder / "log", appended))
        lines = (folder / "log" / LOG).read_bytes().splitlines()
        limit = seconds(lambda: append_raw(folder / "raw", lines))
        print(
            f"{appended} events, a checkpoint each {EACH}: {took:.1f} s, {appended / took:.0f} a second; "
            f"the disk alone {limit:.1f} s: × {took / limit:.2f}"
        )
        many = folder / "many"
        many.mkdir()
        content = [Entry(event, BEGAN).encode() for event in events(verified)]
        (many / LOG).write_bytes(b"".join(line + b"\n" for line in content))
        Log(many, KEY, HistoryOfRun(), lambda: BEGAN).sign(WRITER)
        history = HistoryOfRun()
        took = seconds(lambda: read_signed(many, KEY, history))
        limit = seconds(lambda: hash_raw(content))
        print(
            f"{verified} leaves verified in {took:.1f} s, {verified / took:.0f} a second; "
            f"their hashes alone {limit:.1f} s: × {took / limit:.1f}"
        )
        tree = history.tree
        size = 1
        while size <= len(tree):
            longest = max(len(tree.inclusion(index, size)) for index in {0, size // 2, size - 1})
            consistent = len(tree.consistency(max(1, size // 3), size))
            print(f"  of {size} leaves: inclusion {longest} hashes, consistency {consistent}")
            size *= 10
        each = seconds(
            lambda: [tree.inclusion(number, len(tree)) for number in range(0, len(tree), max(1, len(tree) // 1000))]
        )
        print(f"  a proof in {each:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
