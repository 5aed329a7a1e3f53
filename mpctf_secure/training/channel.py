"""The talk between a participant's agent and rank 0 of its training job, over a Unix socket or TLS.

A frame is u32be(header length) ‖ JSON header ‖ u64be(body length) ‖ body, the body a flat float32 adapter or nothing.
Both ends belong to one site and one user: the socket's folder has mode 0700, or both have shown certificates.
"""

import json
import socket
from typing import Any

import numpy as np

from mpctf_secure.aggregation.lora import Vector
from mpctf_secure.errors import EnvironmentUnfitError

MAX_HEADER_BYTES = 1 << 26
MAX_BODY_BYTES = 1 << 33
Header = dict[str, Any]


class JobChannel:
    """One connected end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, header: Header, body: Vector | None = None) -> None:
        """One frame; EnvironmentUnfitError when the other end is gone, TimeoutError where the socket has a limit."""
        raw = json.dumps(header).encode()
        content = b"" if body is None else body.astype("<f4", copy=False).tobytes()
        try:
            self._connection.sendall(len(raw).to_bytes(4, "big") + raw + len(content).to_bytes(8, "big"))
            self._connection.sendall(content)
        except OSError as error:
            raise _ended(error) from error

    def receive(self) -> tuple[Header, Vector]:
        """The next frame; errors as above, and EnvironmentUnfitError for a frame that is larger than the limits."""
        header = json.loads(self._take(4, MAX_HEADER_BYTES))
        return header, np.frombuffer(self._take(8, MAX_BODY_BYTES), "<f4").astype(np.float32)

    def close(self) -> None:
        """Hang up; the other end notices."""
        self._connection.close()

    def _take(self, prefix: int, limit: int) -> bytes:
        size = int.from_bytes(self._exactly(prefix), "big")
        if size > limit:
            raise EnvironmentUnfitError(f"training job sent a frame of {size} bytes", hint="see the worker's log")
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            try:
                count = self._connection.recv_into(view)
            except OSError as error:
                raise _ended(error) from error
            if count == 0:
                raise _gone()
            view = view[count:]
        return bytes(buffer)


def _ended(error: OSError) -> Exception:
    """The socket's own limit, which has no errno, or that nobody is there: then TCP too may call it a time-out."""
    return error if isinstance(error, TimeoutError) and error.errno is None else _gone()


def _gone() -> EnvironmentUnfitError:
    return EnvironmentUnfitError("the other end of the training job's connection is gone", hint="see the worker's log")
