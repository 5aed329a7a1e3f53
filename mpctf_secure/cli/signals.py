"""Being told to end."""

import signal
from types import FrameType


def interrupt_when_told_to_end() -> None:
    """SIGTERM, as of a service manager, and SIGHUP, as of a terminal that is gone, do what Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
