"""`mpctf-secure join`: one participant in the foreground."""

import signal
from pathlib import Path
from types import FrameType

import typer

from mpctf_secure.cli import passphrase
from mpctf_secure.cli.text import one_line
from mpctf_secure.config import load
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.identity import keystore
from mpctf_secure.participant.agent import join, serve


def join_run(site_file: Path, passphrase_fd: int | None, *, once: bool) -> None:
    """Open the keys and take part, in one run or in one after the other."""
    site = load_site(site_file)
    signal.signal(signal.SIGTERM, _interrupt)
    keys = keystore.unseal(site.keys, passphrase.read(passphrase_fd))
    (join if once else serve)(site, keys, lambda line: typer.echo(one_line(line)))


def load_site(site_file: Path) -> SiteConfig:
    """The site file, whose paths are relative to it."""
    site = load.load(site_file, SiteConfig)
    beside = site_file.resolve().parent
    return site.model_copy(update={name: beside / getattr(site, name) for name in ("model", "data", "keys", "work")})


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
