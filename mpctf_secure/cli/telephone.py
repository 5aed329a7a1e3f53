"""What operators of a ceremony see, read to each other, and type."""

from collections.abc import Sequence

import typer

from mpctf_secure.cli.text import one_line
from mpctf_secure.errors import SecurityError
from mpctf_secure.identity import enrollment
from mpctf_secure.identity.documents import Document, Request, RosterBody, SignedRoster, Vote

_TRIES = 3


def hear(name: str, roster: RosterBody, me: str) -> bool:
    """Let the operator type what somebody reads out; False where it was skipped. Typing errors are no false words."""
    expected, false = enrollment.words(roster, name), 0
    while false < _TRIES:
        typer.echo(f"what {name} reads to you; four letters of each word are enough; an empty line: later")
        try:
            typed = input(f"{name}: ")
        except EOFError:
            return False
        if not typed.strip():
            return False
        if enrollment.same_words(typed, expected):
            typer.echo(f"{name} has the same roster")
            return True
        if mistyped := enrollment.find_typing_error(typed):
            typer.echo(one_line(f"{mistyped}; once more"))
        elif enrollment.same_words(typed, enrollment.words(roster, me)):
            typer.echo(f"these are your own words; {name} has others")
        else:
            false += 1
            typer.echo(f"these are not the words of {name} for this roster; {_TRIES - false} more tries")
    raise SecurityError(
        f"{name} has another roster than you",
        hint="does it use the same files? else one was changed on its way: send all requests again by another way",
        culprits=[name],
    )


def show(document: Document, me: str) -> None:
    """Print what a file of the ceremony says; of a roster also the own words."""
    match document:
        case Request():
            enrollment.verify_request(document)
            typer.echo(f"request of {document.name}, {document.role}, {document.created} to {document.expires}")
            typer.echo(f"  identity {document.identity}")
            typer.echo(f"  program  {document.package}")
        case SignedRoster():
            show(document.roster, me)
            names = {member.identity: member.name for member in document.roster.members}
            for vote in document.signatures:
                heard = ", ".join(vote.heard) or "nobody"
                typer.echo(f"  signed by {names.get(vote.signer, vote.signer[:16])}, who heard {heard}")
        case RosterBody():
            typer.echo(f"roster version {document.version}, until {document.expires}")
            for member in document.members:
                typer.echo(f"  {member.name:20} {member.role:12} {member.identity[:16]}…")
            if me in {member.name for member in document.members}:
                show_words(document, me)
        case Vote():
            typer.echo(f"signature of {document.signer[:16]}… on {document.roster[:16]}…")


def show_changes(previous: RosterBody | None, roster: RosterBody) -> None:
    """Print who joins, leaves, has new keys or a later end."""
    before = {member.name: member for member in previous.members} if previous else {}
    now = {member.name: member for member in roster.members}
    lines: list[tuple[str, Sequence[str]]] = [
        ("joins", [n for n in now if n not in before]),
        ("leaves", [n for n in before if n not in now]),
        ("new keys", [n for n in now if n in before and now[n].identity != before[n].identity]),
        ("renewed", [n for n in now if n in before and now[n] != before[n] and now[n].identity == before[n].identity]),
    ]
    typer.echo(f"roster version {roster.version}, until {roster.expires[:10]}")
    for label, names in lines:
        if names:
            typer.echo(one_line(f"  {label}: {', '.join(names)}"))


def show_programs(roster: RosterBody, me: str) -> None:
    """Who says that another version of this program runs there."""
    package = {member.name: member.package for member in roster.members}
    if others := [name for name in package if package[name] != package[me]]:
        typer.echo(f"  another version of this program than here: {', '.join(others)}")


def show_words(roster: RosterBody, me: str) -> None:
    """Only one's own: the others' are what is to be heard."""
    words = enrollment.words(roster, me)
    typer.echo("what you read to the others:")
    for row in range(6):
        typer.echo("  " + "  ".join(f"{n + 1:2} {words[n]:10}" for n in range(row, len(words), 6)))
