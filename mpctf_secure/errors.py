"""The error tree: whose fault it is decides the class, the class decides the exit code.

A peer's fault, the user's own misuse and an unfit environment are separate branches, so that a handler for one
can never swallow another. The cli prints every `MpctfError` as one `error:` line and one `hint:` line.
"""

import contextlib
from collections.abc import Iterable, Iterator

COORDINATOR = "coordinator"
"""The culprit where the coordinator is at fault, whatever its name in the roster."""


class MpctfError(Exception):
    """Base of all errors this package raises on purpose.

    `culprits` answers "who?": identity names of the peers at fault, empty where nobody is.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", culprits: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.culprits = tuple(culprits)


class UsageError(MpctfError):
    """Bad usage, config or data: the message names file, field or row."""

    exit_code = 2


class EnvironmentUnfitError(MpctfError):
    """The machine is not fit: a port, a disk, a missing model, a child process that died."""

    exit_code = 3


class SecurityError(MpctfError):
    """A check that protects somebody failed; `culprits` names whose message it was."""

    exit_code = 4


class DecodeError(SecurityError):
    """Bytes from outside are not what they should be."""


@contextlib.contextmanager
def blaming(culprit: str, what: str) -> Iterator[None]:
    """A SecurityError inside becomes one about `what` and is put down to `culprit`, whoever is named in the bytes."""
    try:
        yield
    except SecurityError as error:
        raise SecurityError(f"{what}: {error.message}", hint=error.hint, culprits=[culprit]) from error


class ParticipationError(MpctfError):
    """Fewer took part than the run's contract asks for."""

    exit_code = 5


class BudgetSpentError(MpctfError):
    """A privacy budget would be exceeded."""

    exit_code = 6


class InterruptedRunError(MpctfError):
    """Somebody stopped the run before its end."""

    exit_code = 7
