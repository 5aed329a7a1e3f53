"""`mpctf-secure join`: one participant in the foreground."""

from pathlib import Path

import typer

from mpctf_secure import files
from mpctf_secure.auditlog.own_events import KeysOpened
from mpctf_secure.cli import passphrase
from mpctf_secure.cli.own_log import own_log
from mpctf_secure.cli.signals import interrupt_when_told_to_end
from mpctf_secure.cli.text import one_line
from mpctf_secure.config import load
from mpctf_secure.config.site import Compute, SiteConfig
from mpctf_secure.identity import keystore
from mpctf_secure.monitoring.events import Event
from mpctf_secure.participant.agent import join, serve

_TEXTS = {
    "no_connection": "no connection to the coordinator: {reason}; trying on",
    "run_joined": "joins run {run}",
    "run_refused": "refuses run {run}: {reason}; {hint}",
    "run_left": "{reason}",
    "job_started": "{rows} rows, {truncated} of them truncated; on {hardware}",
    "job_failed": "the training job failed, {code}: {message} (node {node}, rank {rank}); {hint}",
    "round_trained": "round {round}: {rows} rows, {tokens} tokens, loss {loss:.3f}, {seconds:.1f} s",
    "round_sat_out": "sits out round {round}: {reason}",
    "attempt_refused": "refuses {reason}",
    "attempt_missed": "attempt {attempt} of round {round} goes on without this site",
    "box_refused": "left attempt {attempt} of round {round}: {reason}: {dealer:.16}…",
    "dealer_convicted": "the shares of {dealer:.16}… convict it; it is out of the run",
    "round_void": "round {round} is void: {reason}",
    "caught_up": "catches up from round {held} to {round}",
    "run_done": "run {run} is over; the adapter: {adapter}",
}
_HELD_OUT = (
    "; sends the adapter after step {held_out[sent_step]}, "
    "validation loss {held_out[loss_after]:.3f}, {held_out[loss_before]:.3f} at its start"
)


def join_run(site_file: Path, passphrase_fd: int | None, *, once: bool, accept_change: bool) -> None:
    """Open the keys and take part, in one run or in one after the other."""
    site = load_site(site_file)
    interrupt_when_told_to_end()
    keys = keystore.unseal(site.keys, passphrase.read(passphrase_fd))
    own = own_log(site.keys)
    own.append(KeysOpened(command="join"))
    own.sign(keys.log)
    typer.echo(f"waits for runs of the coordinator at {site.coordinator}")
    accepted = files.digest(site.data) if accept_change and site.data.exists() else b""
    (join if once else serve)(site, keys, own, _show, accepted)


def load_site(site_file: Path) -> SiteConfig:
    """The site file, whose paths are relative to it."""
    site = load.load(site_file, SiteConfig)
    beside = site_file.resolve().parent
    paths = {name: beside / getattr(site, name) for name in ("model", "data", "keys", "work")}
    return site.model_copy(update={**paths, "compute": _resolved(site.compute, beside)})


def _resolved(compute: Compute, beside: Path) -> Compute:
    ssh = compute.ssh
    if ssh is None:
        return compute
    paths = {"known_hosts": beside / ssh.known_hosts, "identity": ssh.identity and beside / ssh.identity}
    return compute.model_copy(update={"ssh": ssh.model_copy(update=paths)})


def _show(event: Event) -> None:
    if text := _TEXTS.get(event.kind):
        held_out = _HELD_OUT if event.fields.get("held_out") else ""
        typer.echo(one_line((text + held_out).format(**event.fields)))
