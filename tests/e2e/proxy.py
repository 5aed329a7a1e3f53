"""A TCP proxy on loopback that is as bad a network as a test wants: slow, late, cut."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from typing import Self

_PIECE = 4096


class Network:
    """Forwards connections to `target` (host:port) at `bytes_a_second` each way, `delay` seconds late.

    `cut_every` (bytes) ends each connection after about that many, by the dice of `seed`.
    """

    def __init__(
        self, target: str, *, bytes_a_second: float = 1e9, delay: float = 0.0, cut_every: int = 0, seed: int = 0
    ) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._rate, self._delay, self._cut_every = bytes_a_second, delay, cut_every
        self._dice = random.Random(seed)  # noqa: S311 - dice of a test
        self._down = False
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self.cuts = 0
        self.forwarded = 0

    def __enter__(self) -> Self:
        self._thread.start()
        serving = asyncio.start_server(self._connected, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(serving, self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def address(self) -> str:
        """Where to dial."""
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """End every connection, and every new one, until `heal`."""
        self._down = True
        self._loop.call_soon_threadsafe(self._abort)

    def heal(self) -> None:
        """Forward again."""
        self._down = False

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """No network inside the block."""
        self.cut()
        try:
            yield
        finally:
            self.heal()

    def _abort(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def _stop(self) -> None:
        self._server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._down:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, far_writer}
        self._open |= pair
        left = [self._dice.randint(1, 2 * self._cut_every) if self._cut_every else 1 << 62]
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(reader, far_writer, left))
                group.create_task(self._forward(far_reader, writer, left))
        except* OSError:
            pass
        finally:
            self._open -= pair
            for one in pair:
                one.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[int]) -> None:
        """Both directions share `left`, the bytes until the cut; a queue keeps the delay from lowering the rate."""
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def deliver() -> None:
            while True:
                due, piece = await pieces.get()
                await asyncio.sleep(due - self._loop.time())
                if not piece:
                    raise ConnectionResetError
                writer.write(piece)
                await writer.drain()
                self.forwarded += len(piece)

        async def take() -> None:
            while piece := await reader.read(_PIECE):
                left[0] -= len(piece)
                if left[0] < 0:
                    self.cuts += 1
                    raise ConnectionResetError
                await asyncio.sleep(len(piece) / self._rate)
                await pieces.put((self._loop.time() + self._delay, piece))
            await pieces.put((self._loop.time() + self._delay, b""))

        await asyncio.gather(deliver(), take())
