"""Options that several commands share."""

from enum import StrEnum
from typing import Annotated

import typer

PassphraseFd = Annotated[
    int | None,
    typer.Option(
        "--passphrase-fd",
        metavar="N",
        min=0,
        help="Read the passphrase from this file descriptor, not the terminal.",
    ),
]


class Format(StrEnum):
    """How a command answers."""

    TEXT = "text"
    JSON = "json"
