"""Participants on this machine: their data, keys and site files, and their processes."""

import asyncio
import contextlib
import datetime
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mpctf_secure import files
from mpctf_secure.cli.models import find_model
from mpctf_secure.config import load
from mpctf_secure.config.base import Frozen
from mpctf_secure.config.run import BUILTIN, RunConfig
from mpctf_secure.config.site import Policy, SiteConfig
from mpctf_secure.config.strategies import MOST_COUNT, FixedSize
from mpctf_secure.errors import EnvironmentUnfitError, MpctfError, UsageError
from mpctf_secure.experiments.intents import write_intents
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.identity import ceremony, keystore
from mpctf_secure.identity.keys import Keys
from mpctf_secure.identity.roster import Roster
from mpctf_secure.ids import ParticipantName
from mpctf_secure.partition.trial import split_by_label, split_iid
from mpctf_secure.training import children
from mpctf_secure.training.rows import Row, answer_text, load_rows, to_json

INTENTS = f"{BUILTIN}intents"
TINY_LLAMA = f"{BUILTIN}tiny-llama"
COORDINATOR = ParticipantName("coordinator")
_INTENT_TEST_ROWS = 216
_INTENT_ROWS = 64  # of a site and round
_POLL_SECONDS = 0.05
_PHRASE = "passphrase"


class Material(Frozen):
    """What local participants work on: one model, a data file each, and a test set if there is one."""

    model: Path
    data: dict[str, Path]
    test: Path | None


def prepare(config: RunConfig, folder: Path, beside: Path) -> Material:
    """Find or make model and data, and read every row once, so that a mistake is found before anything starts."""
    data, test = _data(config, folder / "data", beside)
    rows = {name: load_rows(path) for name, path in data.items()}
    if test is not None:
        rows["test"] = load_rows(test)
    return Material(model=_model(config, folder / "model", beside, rows), data=data, test=test)


def _data(config: RunConfig, target: Path, beside: Path) -> tuple[dict[str, Path], Path | None]:
    names, source = config.participants.names, config.participants.data
    test = beside / config.evaluation.test if config.evaluation.test else None
    if source == INTENTS:
        size = config.data.size if isinstance(config.data, FixedSize) else _INTENT_ROWS
        write_intents(target, names, config.rounds * size, _INTENT_TEST_ROWS, config.seed)
        return {name: target / f"{name}.jsonl" for name in names}, test or target / "test.jsonl"
    if source.startswith(BUILTIN):
        raise UsageError(f"participants.data: there is no {source}", hint=f"did you mean {INTENTS}?")
    if config.participants.split is None:
        return {name: beside / source.replace("{participant}", name) for name in names}, test
    return dict(_split(config, beside / source, target)), test


def _split(config: RunConfig, source: Path, target: Path) -> Iterator[tuple[str, Path]]:
    rows, names = load_rows(source), config.participants.names
    if config.participants.split == "label":
        parts = split_by_label([answer_text(row) for row in rows], len(names), config.seed)
    else:
        parts = split_iid(len(rows), len(names), config.seed)
    target.mkdir(parents=True)
    for name, part in zip(names, parts, strict=True):
        path = target / f"{name}.jsonl"
        path.write_text("".join(f"{to_json(rows[index])}\n" for index in part), encoding="utf-8")
        yield name, path


def _model(config: RunConfig, target: Path, beside: Path, rows: dict[str, list[Row]]) -> Path:
    if config.model.base != TINY_LLAMA:
        return find_model(config.model.base, beside)
    texts = (message.content for part in rows.values() for row in part for message in row.messages)
    write_tiny_llama(target, texts)
    return target


def hold_ceremony(config: RunConfig, folder: Path, now: datetime.datetime, phrase: bytes) -> tuple[Roster, Keys]:
    """Fresh keys for everyone and a roster that all signed; the coordinator's keys."""
    members = [*map(ParticipantName, config.participants.names), COORDINATOR]
    roster = ceremony.hold({name: keys_folder(folder, name) for name in members}, COORDINATOR, now, phrase)
    return roster, keystore.unseal(keys_folder(folder, COORDINATOR), phrase)


def destroy_keys(config: RunConfig, folder: Path) -> None:
    """The keys of an ephemeral ceremony are good for nothing after its run."""
    for name in (*config.participants.names, COORDINATOR):
        keystore.destroy(keys_folder(folder, name))
    (folder / _PHRASE).unlink(missing_ok=True)


def make_phrase(folder: Path) -> bytes:
    """The passphrase of an ephemeral ceremony's keys: beside them, for nobody else is to be kept out of a trial."""
    phrase = secrets.token_hex(32).encode()
    files.create(folder / _PHRASE, phrase)
    return phrase


def load_phrase(folder: Path) -> bytes:
    """The passphrase of a run that is gone on with; UsageError where its keys were destroyed at its end."""
    try:
        return (folder / _PHRASE).read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"{folder.name} has ended, its keys are destroyed", hint="start another run") from error


def keys_folder(folder: Path, name: str) -> Path:
    """Where a local member's keys lie in a run folder."""
    return folder / "sites" / name / "keys"


@contextlib.contextmanager
def _readable(content: bytes) -> Iterator[int]:
    """A descriptor that gives these few bytes and then ends."""
    reading, writing = os.pipe()
    try:
        os.write(writing, content)
        os.close(writing)
        yield reading
    finally:
        os.close(reading)


class Fleet:
    """The `join` processes of the local participants."""

    def __init__(self, config: RunConfig, folder: Path, phrase: bytes) -> None:
        self._config = config
        self._folder = folder
        self._phrase = phrase
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, material: Material, address: str) -> None:
        """Write each site file and start its process."""
        threads = str(max(1, (os.cpu_count() or 1) // len(material.data)))
        for name, data in material.data.items():
            home = self._folder / "sites" / name
            secagg = self._config.secagg  # they are the operator's own, who has said what is wanted
            policy = Policy(
                allow_pair=secagg.allow_pair,
                allow_clear=not secagg.secure,
                most_void_rounds=secagg.void_rounds,
                most_passes=MOST_COUNT,
            )
            site = SiteConfig(coordinator=address, model=material.model, data=data, policy=policy)
            (home / "site.yaml").write_text(load.dump(site), encoding="utf-8")
            with _readable(self._phrase) as descriptor:
                argv = [sys.executable, "-m", "mpctf_secure", "join", str(home / "site.yaml")]
                argv += ["--once", "--passphrase-fd", str(descriptor)]
                environment = {"OMP_NUM_THREADS": threads}
                self._children[name] = children.spawn(argv, home / "join.log", environment, keep=[descriptor])

    @contextlib.contextmanager
    def watched(self, gone: Callable[[str, str], None]) -> Iterator[None]:
        """Call gone(name, reason) in the event loop as soon as a process ends, by itself or killed."""
        loop = asyncio.get_running_loop()
        descriptors = {name: os.pidfd_open(child.pid) for name, child in self._children.items()}

        def ended(name: str, descriptor: int) -> None:
            loop.remove_reader(descriptor)
            gone(name, self._reason(name))

        for name, descriptor in descriptors.items():
            loop.add_reader(descriptor, ended, name, descriptor)
        try:
            yield
        finally:
            for descriptor in descriptors.values():
                loop.remove_reader(descriptor)
                os.close(descriptor)

    def finish(self, seconds: float, first: float = 0.0) -> None:
        """Wait for processes that end by themselves, and so much longer for the first; end those that do not."""
        deadline = time.monotonic() + first
        while time.monotonic() < deadline and all(child.poll() is None for child in self._children.values()):
            time.sleep(_POLL_SECONDS)
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(seconds)
        children.end(list(self._children.values()))

    def end(self) -> None:
        """End all processes."""
        children.end(list(self._children.values()))

    def failures(self) -> list[MpctfError]:
        """The errors of users and machines with which participants have ended."""
        kinds = {kind.exit_code: kind for kind in (UsageError, EnvironmentUnfitError)}
        return [
            kinds[code](f"{name}: {said['error']}", hint=said.get("hint", ""))
            for name, child in self._children.items()
            if (code := child.poll()) in kinds and (said := self._said(name))
        ]

    def _reason(self, name: str) -> str:
        code, said = self._children[name].wait(), self._said(name)
        ending = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"process {ending}" + (f": {said['error']}" if said else "")

    def _said(self, name: str) -> dict[str, str]:
        """The last error and hint in a participant's log; nothing where there is no error."""
        lines = (self._folder / "sites" / name / "join.log").read_text(errors="replace").splitlines()
        said = {word: rest for word, _, rest in (line.partition(": ") for line in lines) if word in {"error", "hint"}}
        return said if "error" in said else {}
