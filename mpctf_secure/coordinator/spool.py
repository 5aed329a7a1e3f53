"""Uploads on disk, and the sum made from them chunk by chunk: memory does not grow with the cohort."""

import asyncio
import contextlib
import os
import shutil
import tempfile
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
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob("*.part"):
            unfinished.unlink()
        missing = len(context.cohort) + 1 - len(list(folder.iterdir()))
        needed, free = missing * self._layout.size, shutil.disk_usage(folder).free
        if needed > free:
            raise EnvironmentUnfitError(
                f"{folder}: the round's uploads need {needed >> 20} MiB, {free >> 20} MiB are free",
                hint="free some space, or put the run folder on another disk with --runs",
            )

    async def receive(self, pieces: AsyncIterator[bytes], size: int) -> Upload | None:
        """Write the chunks of an upload said to have `size` bytes; SecurityError for any but the schema's sizes.

        None for a stream that breaks off, which is the network's fault: the sender comes again.
        """
        if size != self._layout.size:
            raise SecurityError(f"upload announces {size} bytes instead of {self._layout.size}")
        hashes = []
        complete = False
        with files.writing(self._folder):
            descriptor, name = tempfile.mkstemp(dir=self._folder, suffix=".part")
        try:
            with files.writing(self._folder), os.fdopen(descriptor, "wb") as stream:
                for expected in self._sizes:
                    chunk = await anext(pieces, b"")
                    if not chunk:
                        return None
                    if len(chunk) != expected:
                        raise SecurityError(f"upload has a chunk of {len(chunk)} bytes instead of {expected}")
                    hashes.append(sha256(chunk))
                    stream.write(chunk)
                trailer = await anext(pieces, b"")
                if not trailer:
                    return None
                if await anext(pieces, None) is not None:
                    raise SecurityError("upload goes on after its digest")
                stream.flush()
                await asyncio.to_thread(os.fsync, stream.fileno())
                complete = True
        finally:
            if not complete:
                Path(name).unlink(missing_ok=True)
        return Upload(Path(name), digest(hashes), trailer, sum(self._sizes))

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
            files.sync_folder(self._folder)

    def open_sum(self, survivors: Iterable[IdentityKey], left: Sequence[masks.Mask], target: Path) -> bytes:
        """Write the sum of the survivors' uploads without the masks that are left; returns its digest."""
        hashes = []
        with files.writing(target), contextlib.ExitStack() as stack:
            uploads = [stack.enter_context(self._of(owner).open("rb")).fileno() for owner in survivors]
            output = stack.enter_context(target.open("wb"))

            def open_chunk(number: int) -> tuple[bytes, bytes]:
                pieces = (os.pread(file, self._sizes[number], self._layout.offset(number)) for file in uploads)
                chunk = masks.unmask_chunk(pieces, left, self._layout, number)
                return chunk, sha256(chunk)

            for chunk, chunk_hash in ordered_map(open_chunk, range(len(self._sizes))):
                hashes.append(chunk_hash)
                output.write(chunk)
            os.fsync(output.fileno())
        return digest(hashes)

    def read_sum(self, path: Path) -> Iterator[bytes]:
        """The chunks of a written sum."""
        with path.open("rb") as stream:
            for size in self._sizes:
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

    def _of(self, owner: IdentityKey) -> Path:
        return self._folder / f"{owner.hex()}.masked"
