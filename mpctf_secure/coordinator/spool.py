"""Uploads on disk, and the sum made from them chunk by chunk: memory does not grow with the cohort."""

import asyncio
import contextlib
import errno
import io
import math
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpctf_secure import files
from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.ids import IdentityKey
from mpctf_secure.parallel import ordered_map
from mpctf_secure.secagg import masks
from mpctf_secure.secagg.chunks import LANE_TYPES, SCALAR_BITS, Lanes, digest
from mpctf_secure.secagg.parameters import Context


@dataclass(frozen=True)
class Upload:
    """A spooled upload: the file, its real digest, the signed digest that came last, and its bytes."""

    path: Path
    digest: bytes
    trailer: bytes
    size: int


class Spool:
    """The uploads of one attempt in one folder."""

    def __init__(self, folder: Path, context: Context) -> None:
        self._folder = folder
        self._layout = context.layout
        self._sizes = context.layout.sizes
        self._pending: dict[IdentityKey, Upload] = {}
        self._moved = -math.inf
        self._furthest: Counter[IdentityKey] = Counter()
        folder.mkdir(parents=True, exist_ok=True)
        here = sum(path.stat().st_size for path in folder.iterdir())
        needed = (len(context.cohort) + 1) * self._layout.size - here
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise EnvironmentUnfitError(
                f"{folder}: the round's uploads need {needed >> 20} MiB, {free >> 20} MiB are free",
                hint="free some space, or put the run folder on another disk with --runs",
            )

    def still(self) -> float:
        """Seconds since a chunk came that had not come before."""
        return asyncio.get_running_loop().time() - self._moved

    def held(self, owner: IdentityKey) -> int:
        """How many whole chunks of an upload are here, of one that broke off or came to its end."""
        path = self._of(owner) if self._of(owner).exists() else self._unfinished(owner)
        size = path.stat().st_size if path.exists() else 0
        return sum(self._layout.offset(number + 1) <= size for number in range(self._layout.vector_chunks))

    async def receive(self, owner: IdentityKey, pieces: AsyncIterator[bytes], size: int, first: int) -> Upload | None:
        """Write the chunks of an upload said to have `size` bytes, from number `first` on.

        SecurityError for any but the schema's sizes. None for a stream that breaks off, which is the network's fault:
        what came stays, and the sender goes on from there.
        """
        if size != self._layout.size or first > self.held(owner):
            raise SecurityError(f"upload announces {size} bytes instead of {self._layout.size}, or begins at {first}")
        path = self._unfinished(owner)
        if first and not path.exists():  # it is here as a whole, but a crash came before its message was journaled
            self._of(owner).replace(path)
        try:
            # Unbuffered: of an older stream that was cancelled nothing is written later than this.
            with files.writing(path), path.open("r+b" if first else "wb", buffering=0) as stream:
                hashes = await asyncio.to_thread(self._hash_chunks, stream.fileno(), first)
                stream.truncate(self._layout.offset(first))
                stream.seek(0, os.SEEK_END)
                trailer = await self._write_chunks(owner, stream, pieces, first, hashes)
                await asyncio.to_thread(os.fsync, stream.fileno())
        except SecurityError:
            path.unlink()
            raise
        return Upload(path, digest(hashes), trailer, sum(self._sizes[first:])) if trailer else None

    async def _write_chunks(
        self, owner: IdentityKey, stream: io.FileIO, pieces: AsyncIterator[bytes], first: int, hashes: list[bytes]
    ) -> bytes:
        """The signed digest at the end; nothing where the stream ends before."""
        for expected in self._sizes[first:]:
            chunk = await anext(pieces, b"")
            if not chunk:
                return b""
            if len(chunk) != expected:
                raise SecurityError(f"upload has a chunk of {len(chunk)} bytes instead of {expected}")
            hashes.append(sha256(chunk))
            if stream.write(chunk) != expected:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if len(hashes) > self._furthest[owner]:  # else who sends one chunk again and again would hold up the round
                self._furthest[owner] = len(hashes)
                self._moved = asyncio.get_running_loop().time()
        trailer = await anext(pieces, b"")
        if trailer and await anext(pieces, None) is not None:
            raise SecurityError("upload goes on after its digest")
        return trailer

    def _hash_chunks(self, file: int, count: int) -> list[bytes]:
        offset = self._layout.offset
        return [sha256(os.pread(file, self._sizes[number], offset(number))) for number in range(count)]

    @contextlib.contextmanager
    def holding(self, owner: IdentityKey, upload: Upload) -> Iterator[None]:
        """A received upload, deleted at the end of the block unless it was kept."""
        self._pending[owner] = upload
        try:
            yield
        finally:
            if self._pending.get(owner) is upload:
                del self._pending[owner]
            upload.path.unlink(missing_ok=True)

    def keep(self, owner: IdentityKey) -> None:
        """The upload that is held for its owner was verified, and is on disk under its name; after a restart it is."""
        if upload := self._pending.pop(owner, None):
            upload.path.replace(self._of(owner))
            files.sync(self._folder)

    def opened(self, survivors: Iterable[IdentityKey], left: Sequence[masks.Mask]) -> Iterator[bytes]:
        """The chunks of the sum of the survivors' uploads, without the masks that are left."""
        with contextlib.ExitStack() as stack:
            uploads = [stack.enter_context(self._of(owner).open("rb")).fileno() for owner in survivors]

            def open_chunk(number: int) -> bytes:
                pieces = (os.pread(file, self._sizes[number], self._layout.offset(number)) for file in uploads)
                return masks.unmask_chunk(pieces, left, self._layout, number)

            yield from ordered_map(open_chunk, range(len(self._sizes)))

    def upload(self, owner: IdentityKey) -> tuple[Lanes, Lanes]:
        """Lanes [d] and scalars of an upload, under its masks if there are any."""
        return self.load_sum(self._of(owner))

    def write_sum(self, target: Path, chunks: Iterable[bytes]) -> bytes:
        """Write a sum; returns its digest."""
        hashes = []
        with files.writing(target), target.open("wb") as output:
            for chunk, chunk_hash in ordered_map(lambda chunk: (chunk, sha256(chunk)), chunks):
                hashes.append(chunk_hash)
                output.write(chunk)
            os.fsync(output.fileno())
        return digest(hashes)

    def read_sum(self, path: Path, first: int) -> Iterator[bytes]:
        """The chunks of a written sum from number `first` on."""
        with path.open("rb") as stream:
            stream.seek(self._layout.offset(first))
            for size in self._sizes[first:]:
                yield stream.read(size)

    def load_sum(self, path: Path) -> tuple[Lanes, Lanes]:
        """Lanes [d] and scalars of a written sum."""
        layout = self._layout
        lanes = np.fromfile(path, LANE_TYPES[layout.bits], layout.dimension)
        scalars = np.fromfile(path, LANE_TYPES[SCALAR_BITS], layout.scalars, offset=layout.offset(layout.vector_chunks))
        return lanes, scalars

    def clear(self) -> None:
        """Delete the uploads; the sum is somewhere else."""
        for path in self._folder.iterdir():
            path.unlink()
        self._folder.rmdir()

    def _unfinished(self, owner: IdentityKey) -> Path:
        return self._folder / f"{owner.hex()}.part"

    def _of(self, owner: IdentityKey) -> Path:
        return self._folder / f"{owner.hex()}.masked"
