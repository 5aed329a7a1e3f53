"""A site as a witness against a coordinator that lies in the run's log; each lie goes through without its check."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chronicle import NOTHING, Chronicle, make_roster
from samples import make_contract

from mpctf_secure.auditlog.events import AttemptOpened, RoundClosed, StepWitnessed, SumPublished, Vetoed
from mpctf_secure.auditlog.history import HistoryOfRun
from mpctf_secure.auditlog.note import Checkpoint, Note
from mpctf_secure.auditlog.own import OwnLog
from mpctf_secure.auditlog.storage import LOG, read_record
from mpctf_secure.auditlog.witness import step_line
from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.ids import IdentityKey
from mpctf_secure.participant import witness as witness_module
from mpctf_secure.participant.witness import Witness
from mpctf_secure.rounds.audit import Fork, find_fork
from mpctf_secure.rounds.messages import Announce, LogRequest, Position, Publication
from mpctf_secure.transport.tls import utc_now

KEYS = sorted((SigningKey(bytes([i]) * 32) for i in range(1, 5)), key=lambda key: key.public)
MEMBERS = tuple(IdentityKey(key.public) for key in KEYS)
CONTRACT = make_contract()
ROSTER = make_roster(CONTRACT.participants, KEYS)
STATE_1, STATE_2, CONTEXT = sha256(b"state 1"), sha256(b"state 2"), sha256(b"context")
CLAIM = b"a tuple of survivors"
OUTCOME = Publication(Announce(1, 1, MEMBERS, MEMBERS), MEMBERS[:3], sha256(b"sum"))
POSITIONS = {1: Position(1, STATE_1).encode(), 2: Position(2, STATE_2).encode()}


NO: Callable[..., Any] = lambda *_, **__: None  # noqa: E731


class Link:
    """The coordinator's end; `chronicle` is what it shows at the moment."""

    def __init__(self, chronicle: Chronicle) -> None:
        self.chronicle = chronicle

    def log(self, ctx: bytes, request: LogRequest, most_pieces: int) -> tuple[bytes, bytes]:
        return self.chronicle.log(request.step, request.size)


def first_round(contract_log: Chronicle, certificate: str, **changes: Any) -> None:
    """Round 1 as the site knows it, but for changes."""
    log, told = contract_log, {"context": CONTEXT.hex(), "tuple": sha256(CLAIM).hex(), "state_hash": STATE_1.hex()}
    told |= {"digest": OUTCOME.digest.hex(), "survivors": log.names(OUTCOME.survivors), **changes}
    log.tell(
        StepWitnessed(round=0, certificate=certificate, witnesses=()),
        AttemptOpened(round=1, attempt=1, context=told["context"], cohort=()),
        SumPublished(
            round=1, attempt=1, tuple=told["tuple"], survivors=told["survivors"], recovered=(), digest=told["digest"]
        ),
        RoundClosed(round=1, state_hash=told["state_hash"]),
    )
    log.sign(1)


def certificate(log: Chronicle, step: int, keys: list[SigningKey] | None = None) -> bytes:
    signers = KEYS[:3] if keys is None else keys
    if step:
        return log.certificate(step, [log.says(key, step, POSITIONS[step]) for key in signers])
    return log.certificate(0, [log.says(key, 0, b"{}", "accept") for key in signers])


class Site:
    """One that has accepted the contract, and taken part in round 1."""

    def __init__(self, folder: Path) -> None:
        keys = folder / "keys"
        keys.mkdir(mode=0o700)
        self.folder, self.keys = folder / "run", keys
        self.folder.mkdir()
        self.log = Chronicle(CONTRACT, ROSTER)
        self.link = Link(self.log)
        self.start()
        self.witness.witness(0, b"{}", None)
        self.agreed = certificate(self.log, 0)
        self.witness.keep_certificate(self.witness.check_certificate(0, self.agreed, None, set(MEMBERS)))
        self.witness.join(1, 1, CONTEXT)
        self.witness.confirm(1, 1, CLAIM)
        self.witness.hear(1, OUTCOME)

    def start(self) -> None:
        own = OwnLog(self.keys, "a", MEMBERS[0], KEYS[0].public, utc_now)
        link: Any = self.link
        self.witness = Witness("a", link, ROSTER, CONTRACT, KEYS[0], own, self.folder, {})

    def close(self, step: int, agreed: bytes | None = None) -> None:
        """All that a site does at the end of a round."""
        state = STATE_1 if step == 1 else STATE_2
        self.witness.witness(step, POSITIONS[step], state)
        said = certificate(self.link.chronicle, step) if agreed is None else agreed
        self.witness.keep_certificate(self.witness.check_certificate(step, said, POSITIONS[step], set(MEMBERS)))

    @property
    def honest(self) -> Chronicle:
        if 1 not in self.log.notes:
            first_round(self.log, sha256(self.agreed).hex())
        return self.log

    def other(self, **changes: Any) -> Chronicle:
        """Another log with the same beginning."""
        made = Chronicle(CONTRACT, ROSTER)
        first_round(made, changes.pop("certificate", sha256(self.agreed).hex()), **changes)
        return made


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_honest_log_is_witnessed_again_with_the_same_bytes_after_a_crash(site: Site) -> None:
    log = site.honest
    body = site.witness.witness(1, POSITIONS[1], STATE_1)
    site.start()
    assert site.witness.witness(1, POSITIONS[1], STATE_1) == body
    (site.folder / "audit" / LOG).unlink()  # the copy is a cache
    (site.folder / "audit" / "steps" / "1").unlink()
    site.start()
    assert site.witness.witness(1, POSITIONS[1], STATE_1) == body
    assert read_record(site.folder / "audit").lines == log.lines
    site.close(1)


def test_copy_that_this_machine_has_spoilt_is_got_again(site: Site) -> None:
    log = site.honest
    path = site.folder / "audit" / LOG
    path.write_bytes(path.read_bytes().replace(b'"roster_version":1', b'"roster_version":2'))
    site.start()
    site.close(1)
    assert read_record(site.folder / "audit").lines == log.lines


def hide(**changes: Any) -> Callable[[Site], None]:
    def lie(site: Site) -> None:
        site.link.chronicle = site.other(**changes)
        site.close(1)

    return lie


def rewrite(site: Site) -> None:
    """What was witnessed at step 0 is another thing at step 1."""
    site.link.chronicle = log = Chronicle(CONTRACT, ROSTER)
    log.lines, log.history = [], HistoryOfRun()
    for line in site.log.lines[:2]:
        log.lines.append(line.replace(b'"roster_version":1', b'"roster_version":2'))
        log.history.take(log.lines[-1])
    first_round(log, sha256(site.agreed).hex())
    site.close(1)


def fork(site: Site) -> None:
    """Others have cosigned a log in which one of them refused; and that is what the certificate is of."""
    assert site.honest
    other = site.other()
    other.tell(Vetoed(participant="b"))
    other.sign(1)
    site.close(1, certificate(other, 1))


def stale(site: Site) -> None:
    """The certificate of step 0 again, which is below both of any two histories."""
    assert site.honest
    site.witness.witness(1, POSITIONS[1], STATE_1)
    site.witness.check_certificate(1, site.agreed, None, set(MEMBERS))


def disorder(site: Site) -> None:
    """The sum before the attempt, and times that go on."""
    log = site.link.chronicle = Chronicle(CONTRACT, ROSTER)
    log.history.check_order = NO  # type: ignore[method-assign]
    whole = site.honest.history.known
    log.tell(*(whole[key].event for key in (("step_witnessed", 0), ("sum_published", 1))))
    log.tell(*(whole[key].event for key in (("attempt_opened", 1, 1), ("round_closed", 1))))
    log.sign(1)
    site.close(1)


def too_few(site: Site) -> None:
    assert site.honest
    site.close(1, certificate(site.log, 1, KEYS[:2]))


def unsigned(site: Site) -> None:
    """A thief of the connection, without the coordinator's log key."""
    log = site.honest
    log.notes[1] = Note(log.notes[1].text).signed(log.key.name, KEYS[3])
    site.witness.follow(1, STATE_1)


Off = list[tuple[object, str, Callable[..., object]]]
LIES: dict[str, tuple[Callable[[Site], None], str, Off]] = {
    "it hides an attempt": (hide(context=NOTHING), "another context", [(witness_module, "check_known", NO)]),
    "it hides what was signed": (hide(tuple=NOTHING), "another tuple", [(witness_module, "check_known", NO)]),
    "it tells of another sum": (hide(digest=NOTHING), "another digest", [(witness_module, "check_known", NO)]),
    "it leaves out a survivor": (hide(survivors=("b",)), "another survivors", [(witness_module, "check_known", NO)]),
    "it tells of another state": (hide(state_hash=NOTHING), "another state_hash", [(witness_module, "demand", NO)]),
    "it tells of other witnesses": (hide(certificate=NOTHING), "another certificate", [(witness_module, "demand", NO)]),
    "it rewrites what was witnessed": (rewrite, "another one than this site has cosigned", [(OwnLog, "cosigned", NO)]),
    "it shows others another log": (fork, "two histories", [(Witness, "_check_same", NO)]),
    "it hands out an old certificate": (stale, "not of step 1|where a transition", []),
    "it tells things in an order that cannot be": (disorder, "is due", [(HistoryOfRun, "check_order", NO)]),
    "too few have witnessed it": (too_few, "only 2 participants", []),
    "somebody else has signed it": (unsigned, "not signed by|signature is not valid", []),
}


@pytest.mark.parametrize(("lie", "why", "off"), LIES.values(), ids=LIES.keys())
def test_lie_is_refused_and_the_coordinator_named(site: Site, lie: Callable[[Site], None], why: str, off: Off) -> None:
    with pytest.raises(SecurityError, match=why) as caught:
        lie(site)
    assert caught.value.culprits == ("coordinator",)


@pytest.mark.parametrize(
    ("lie", "off"), [(lie, off) for lie, _, off in LIES.values() if off], ids=[n for n, case in LIES.items() if case[2]]
)
def test_lie_goes_through_without_its_check(
    site: Site, monkeypatch: pytest.MonkeyPatch, lie: Callable[[Site], None], off: Off
) -> None:
    for where, name, nothing in off:
        monkeypatch.setattr(where, name, nothing)
    lie(site)


def test_evidence_of_a_fork_convicts_whoever_shows_it_to_whom(site: Site) -> None:
    with pytest.raises(SecurityError) as caught:
        fork(site)
    assert "fork.json convicts it" in caught.value.hint
    evidence = Fork.decode((site.folder / "audit" / "fork.json").read_bytes())
    assert evidence.key == site.log.key
    sizes = [Checkpoint.decode(note.text).size for note in evidence.notes]
    assert sizes == [len(site.log.lines), len(site.log.lines) + 1]


def forgeries(site: Site) -> Iterator[bytes]:
    """What a site might make up to get rid of an honest coordinator."""
    key, honest = site.log.key, site.honest.notes
    forged = Note(honest[1].text.replace(step_line(1), step_line(0))).signed(key.name, KEYS[0])
    yield Fork(key, (honest[0], honest[1])).encode()
    yield Fork(key, (honest[0], honest[0])).encode()
    yield Fork(key, (honest[0], forged)).encode()
    yield b"{}"
    yield b'{"log": "%b", "notes": ["\\ud800", ""]}' % key.vkey.encode()
    yield b'{"log": 1, "notes": []}'
    yield b'{"log": "a+b+c", "notes": ["", ""]}'
    yield b"[" * 100_000
    yield b"\xff"


def test_no_evidence_convicts_an_honest_coordinator(site: Site) -> None:
    for evidence in forgeries(site):
        with pytest.raises(SecurityError):
            Fork.decode(evidence)


def test_two_sites_that_were_shown_two_logs_find_it_out_when_they_compare(site: Site, tmp_path: Path) -> None:
    """Whoever has only the one side of it cannot know."""
    assert site.honest
    site.close(1)
    (tmp_path / "b").mkdir()
    twin = Site(tmp_path / "b")
    twin.link.chronicle = other = twin.other()
    other.tell(Vetoed(participant="b"))
    other.sign(1)
    twin.close(1)
    mine, theirs = (read_record(one.folder / "audit") for one in (site, twin))
    assert find_fork(mine, mine, site.log.key) is None
    found = find_fork(mine, theirs, site.log.key)
    assert found
    assert Fork.decode(found.encode()) == found


def test_witness_restored_from_a_backup_of_all_it_has_cosigns_a_fork_and_counts_towards_those_who_may_lie() -> None:
    """n = 4, c = 1: with its help and that of no other, two histories never both get a quorum."""
    members, liars = len(CONTRACT.participants), CONTRACT.colluders
    assert 2 * CONTRACT.agreement > members + liars


def test_restored_work_folder_does_not_let_a_witness_cosign_a_fork(site: Site) -> None:
    """What it has cosigned is known by its own log, which lies with the keys."""
    assert site.honest
    site.close(1)
    for path in sorted((site.folder / "audit").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    site.link.chronicle = other = site.other()
    other.tell(Vetoed(participant="b"))
    other.sign(1)
    site.start()
    with pytest.raises(SecurityError, match="another one than this site has cosigned at step 1"):
        site.close(1)
