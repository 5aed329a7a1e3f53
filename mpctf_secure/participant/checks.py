"""What `doctor` looks at before a run: every check says what it found, or raises an error with how to mend it."""

import contextlib
import ctypes
import datetime
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from mpctf_secure import files
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.config.strategies import FedAvg
from mpctf_secure.config.training import Training
from mpctf_secure.errors import EnvironmentUnfitError, MpctfError, SecurityError, UsageError
from mpctf_secure.identity import keystore
from mpctf_secure.monitoring.resources import free_memory
from mpctf_secure.participant.store import Store
from mpctf_secure.privacy.ledger import Ledger, check_rows
from mpctf_secure.training.launch.job import Job
from mpctf_secure.training.model_hash import has_chat_template, hash_model
from mpctf_secure.training.rows import load_rows
from mpctf_secure.training.spec import JobSpec
from mpctf_secure.transport.probe import NobodyListensError, probe
from mpctf_secure.transport.tls import utc_now

_EXPIRES_SOON = datetime.timedelta(days=30)
_LEAST_FREE = 1 << 30
_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)
_TIMEX_BYTES = 512  # struct timex has 208


class Warned(NamedTuple):
    """Good enough today."""

    text: str
    mend: str


class Finding(NamedTuple):
    """One check's outcome; `code` is the exit code where it failed."""

    check: str
    state: Literal["ok", "warn", "fail"]
    text: str
    mend: str = ""
    code: int = 0


Check = Callable[[SiteConfig], str | Warned]


def examine(checks: Mapping[str, Check], site: SiteConfig) -> list[Finding]:
    """Every check, whatever the others found."""
    return [_finding(name, check, site) for name, check in checks.items()]


def _finding(name: str, check: Check, site: SiteConfig) -> Finding:
    try:
        found = check(site)
    except MpctfError as error:
        return Finding(name, "fail", error.message, error.hint, error.exit_code)
    return Finding(name, "warn", *found) if isinstance(found, Warned) else Finding(name, "ok", found)


def check_clock(site: SiteConfig) -> str | Warned:
    """Certificates live for a day: a clock that is off by more than minutes shuts a site out."""
    now = utc_now()
    newest = keystore.newest_request(site.keys)
    if newest and now < newest:
        raise EnvironmentUnfitError(f"the clock says {now:%Y-%m-%d %H:%M} UTC, before the roster was made", hint=_NTP)
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    if state == _UNSYNCHRONISED:
        return Warned(f"{now:%Y-%m-%d %H:%M:%S} UTC, and nothing keeps it right", _NTP)
    return f"{now:%Y-%m-%d %H:%M:%S} UTC, synchronised"


_NTP = "run a time service, for example systemd-timesyncd or chrony"


def check_modes(site: SiteConfig) -> str | Warned:
    """Keys are their owner's alone; rows and logs, which may hold prompts, at least not everybody's."""
    paths = [site.keys, *site.keys.rglob("*")]
    for path in paths:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError as error:
            raise EnvironmentUnfitError(f"{path}: {error.strerror}", hint="mpctf-secure enroll init NAME") from error
        if mode & 0o077:
            raise SecurityError(f"{path}: mode {mode:04o} lets others in", hint=f"chmod go= {path}")
    for path in (site.data, site.work):
        if path.exists() and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o007:
            return Warned(f"{path}: mode {mode:04o} lets everybody in", f"chmod o= {path}")
    return f"nobody else may read {site.keys}, nor everybody {site.data} and {site.work}"


def check_keys(site: SiteConfig) -> str:
    """The sealed files are whole; the passphrase is not asked for."""
    held = keystore.check_sealed(site.keys)
    return f"keys of {keystore.organisation(site.keys).name}, {len(held)} sealed file{'s' if len(held) > 1 else ''}"


def check_roster(site: SiteConfig) -> str | Warned:
    """Installed, every step of it verified, not expired, and with this site's own identity."""
    roster, now = keystore.load_roster(site.keys), utc_now()
    roster.check_unexpired(now)
    text = f"version {roster.version}, {len(roster.members)} members, until {roster.expires:%Y-%m-%d}"
    if roster.expires - now < _EXPIRES_SOON:
        return Warned(text, "mpctf-secure enroll renew, everybody, and a next roster")
    return text


def check_coordinator(site: SiteConfig) -> str | Warned:
    """If something answers at the coordinator's address, it is the coordinator; nothing does before a run."""
    try:
        return probe(site.coordinator, keystore.load_roster(site.keys).coordinator, utc_now())
    except NobodyListensError as error:
        return Warned(error.message, error.hint)


def check_model(site: SiteConfig) -> str:
    """The base model's files, and their hash, which every site must find alike."""
    return f"{site.model}, hash {hash_model(site.model).whole.hex()[:16]}…"


def check_data(site: SiteConfig) -> str | Warned:
    """Every row parses, and the model has a chat template where one is needed."""
    rows = load_rows(site.data)
    if not (site.model / "config.json").is_file():
        return Warned(f"{len(rows)} rows in {site.data}, not tried with the model", "see the finding on the model")
    if not has_chat_template(site.model) and (first := next((row for row in rows if not row.is_text), None)):
        raise EnvironmentUnfitError(
            f"{first.where}: only rows of `text` go without a chat template, and {site.model} has none",
            hint="use an instruction-tuned model",
        )
    return f"{len(rows)} rows in {site.data}"


def check_compute(site: SiteConfig) -> str:
    """What the compute section names is there, as far as this machine can see."""
    compute = site.compute
    if compute.ssh:
        for path in filter(None, (compute.ssh.known_hosts, compute.ssh.identity)):
            if not path.is_file():
                raise EnvironmentUnfitError(f"compute.ssh: {path}: no such file", hint="see configs/sites/ssh.yaml")
    if compute.launcher != "local":
        return f"{compute.launcher}: join --check starts a job"
    gpus = [index for node in compute.nodes for index in node.gpus]
    free_memory(gpus)
    return f"GPUs {', '.join(map(str, gpus))}" if gpus else "all GPUs here, or the processor"


def check_ledger(site: SiteConfig) -> str | Warned:
    """The privacy ledger is whole, and the rows are those that it knows."""
    charges = Ledger(site.keys).charges()
    own = [charge for charge in charges if charge.data_set == site.data_set]
    try:
        if site.data.is_file():
            check_rows(charges, site.data_set, files.digest(site.data).hex(), accept_change=False)
    except UsageError as error:
        return Warned(error.message, error.hint)
    except OSError as error:
        return Warned(f"{site.data}: {error.strerror}", "see the finding on the data")
    return f"{len(own)} rounds were charged to data set {site.data_set}"


def check_work(site: SiteConfig) -> str | Warned:
    """The work folder can be written to, and has room."""
    try:
        site.work.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentUnfitError(f"{site.work}: {error.strerror}", hint="name another `work` folder") from error
    if not os.access(site.work, os.W_OK):
        raise EnvironmentUnfitError(f"{site.work}: not writable", hint="name another `work` folder")
    free = shutil.disk_usage(site.work).free
    text = f"{site.work}, {free >> 30} GiB free"
    return Warned(text, "free some space") if free < _LEAST_FREE else text


def check_training(site: SiteConfig) -> str:
    """One step of training with the site's settings, or the default ones, in a job like a run's."""
    check_work(site)
    if not (site.model / "config.json").is_file():
        raise EnvironmentUnfitError(f"{site.model}: not a model folder", hint="see the finding on the model")
    settings = Training().model_copy(update=site.training.chosen())
    hashes = hash_model(site.model).whole, files.digest(site.data)
    spec = JobSpec.of(site, hashes, Lora(), settings, FedAvg())
    # The store's lock: a job of a run that is on would lose its ticket, or its memory.
    with contextlib.closing(Store(site.work)), contextlib.closing(Job(spec, site)) as job:
        rows = list(range(min(settings.batch_size, job.rows)))
        trained = job.train(job.zeros(), rows, [name for name, _ in job.schema], lambda *_: None)
        job.check_finite(trained)
        return f"{trained.rows} rows, {trained.tokens} tokens in {trained.seconds:.1f} s on {job.hardware_text}"


CHECKS: Mapping[str, Check] = {
    "clock": check_clock,
    "file modes": check_modes,
    "keys": check_keys,
    "roster": check_roster,
    "coordinator": check_coordinator,
    "model": check_model,
    "data": check_data,
    "compute": check_compute,
    "ledger": check_ledger,
    "work folder": check_work,
}
"""Seconds, and harmless."""

TRIAL: Mapping[str, Check] = {**CHECKS, "training": check_training}
"""With a real training step."""
