"""`mpctf-secure enroll mailbox | send | fetch`: files of the ceremony by way of the coordinator, whom nobody trusts."""

import asyncio
import signal
from collections.abc import Mapping
from pathlib import Path

import typer

from mpctf_secure.cli.text import one_line
from mpctf_secure.coordinator.mailbox import Folder, file_name
from mpctf_secure.errors import SecurityError
from mpctf_secure.files import writing
from mpctf_secure.identity.documents import Document, Organisation, Request, decode_any
from mpctf_secure.identity.keys import Keys
from mpctf_secure.identity.roster import Member, as_member
from mpctf_secure.ids import IdentityKey, ParticipantName
from mpctf_secure.transport.mailbox import Mailbox, serve
from mpctf_secure.transport.tls import OwnTls


def serve_mailbox(listen: str, owner: Organisation, keys: Keys, folder: Path) -> None:
    """Serve until SIGINT or SIGTERM."""
    own = Member(ParticipantName(owner.name), owner.role, IdentityKey(keys.identity.public), keys.log.public)
    asyncio.run(_serve(listen, OwnTls(keys.identity, own), Folder(folder)))


async def _serve(listen: str, tls: OwnTls, folder: Folder) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    server, port = await serve(listen, tls, folder)
    typer.echo(f"mailbox at {listen.rpartition(':')[0]}:{port}; end it with Ctrl-C")
    await stopped.wait()
    await server.stop(1.0)


def send_files(documents: Mapping[Path, Document], address: str, coordinator: Request) -> None:
    """Leave documents in a mailbox."""
    mailbox = _open(address, coordinator)
    try:
        for path, document in documents.items():
            mailbox.put(document.encode())
            typer.echo(f"sent {path}")
    finally:
        mailbox.close()


def fetch_files(address: str, coordinator: Request) -> None:
    """Write what lies in a mailbox to the current folder; what is no file of the ceremony is left out and said."""
    mailbox = _open(address, coordinator)
    try:
        for data in mailbox.files():
            try:
                path = Path(file_name(decode_any(data)))
            except SecurityError as error:
                typer.echo(one_line(f"left out a file: {error.message}"))
                continue
            with writing(path):
                path.write_bytes(data)
            typer.echo(f"fetched {path}")
    finally:
        mailbox.close()


def _open(address: str, coordinator: Request) -> Mailbox:
    return Mailbox(address, as_member(coordinator))
