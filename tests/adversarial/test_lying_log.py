"""A site as a witness against a coordinator that lies in the run's log; each lie goes through without its check."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chronicle import NOTHING, Chronicle, make_roster
from samples import make_contract

from mpctf_secure.auditlog.events import (
    AttemptFailed,
    AttemptOpened,
    Leaf,
    ModelExported,
    RoundClosed,
    RoundVoid,
    RunEnded,
    StepWitnessed,
    SumPublished,
    Vetoed,
)
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
from mpctf_secure.rounds.messages import Announce, LogRequest, Position, Publication, Void
from mpctf_secure.secagg.messages import Survivors
from mpctf_secure.transport.tls import utc_now

KEYS = sorted((SigningKey(bytes([i]) * 32) for i in range(1, 5)), key=lambda key: key.public)
MEMBERS = tuple(IdentityKey(key.public) for key in KEYS)
CONTRACT = make_contract()
ROSTER = make_roster(CONTRACT.participants, KEYS)
STATES = {number: sha256(b"state %d" % number) for number in (1, 2, 3)}
STATE_1, CONTEXT = STATES[1], sha256(b"context")
CLAIM = Survivors(bytes(32), MEMBERS, MEMBERS[:3], (bytes(32),) * 3).encode()
OPENED = Announce(1, 1, MEMBERS, MEMBERS)
OUTCOME = Publication(OPENED, MEMBERS[:3], sha256(b"sum"))
POSITIONS = {number: Position(number, state).encode() for number, state in STATES.items()}


NO: Callable[..., Any] = lambda *_, **__: None  # noqa: E731
YES: Callable[..., Any] = lambda *_, **__: True  # noqa: E731


class Link:
    """The coordinator's end; `chronicle` is what it shows at the moment, once `before` was shown."""

    def __init__(self, chronicle: Chronicle) -> None:
        self.chronicle = chronicle
        self.before: list[Chronicle] = []

    def log(self, ctx: bytes, request: LogRequest, most_pieces: int) -> tuple[bytes, bytes]:
        shown = self.before.pop(0) if self.before else self.chronicle
        return shown.log(request.step, request.size)


def first_round(log: Chronicle, agreed: bytes, number: int = 1, **changes: Any) -> None:
    """A round as the site knows it, but for changes."""
    published = {"tuple": sha256(CLAIM).hex(), "recovered": ("d",), "digest": OUTCOME.digest.hex()}
    leaves: list[Leaf] = [
        log.witnessed(number - 1, agreed),
        AttemptOpened(round=number, attempt=1, context=CONTEXT.hex(), cohort=log.names(MEMBERS)),
        SumPublished(round=number, attempt=1, survivors=log.names(OUTCOME.survivors), **published),
        RoundClosed(round=number, state_hash=STATES[number].hex()),
    ]
    for leaf in leaves:
        known = {name: value for name, value in changes.items() if name in type(leaf).model_fields}
        log.tell(leaf.model_copy(update=known))
    log.sign(number)


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
        self.witness.join(OPENED, CONTEXT)
        self.witness.confirm(OPENED, CLAIM)
        self.witness.hear(OUTCOME)

    def start(self) -> None:
        own = OwnLog(self.keys, "a", MEMBERS[0], KEYS[0].public, utc_now)
        link: Any = self.link
        self.witness = Witness("a", link, ROSTER, CONTRACT, KEYS[0], own, self.folder, {})

    def close(self, step: int, agreed: bytes | None = None) -> None:
        """All that a site does at the end of a round."""
        self.witness.witness(step, POSITIONS[step], STATES[step])
        said = certificate(self.link.chronicle, step) if agreed is None else agreed
        self.witness.keep_certificate(self.witness.check_certificate(step, said, POSITIONS[step], set(MEMBERS)))

    @property
    def honest(self) -> Chronicle:
        if 1 not in self.log.notes:
            first_round(self.log, self.agreed)
        return self.log

    def other(self, **changes: Any) -> Chronicle:
        """Another log with the same beginning."""
        made = Chronicle(CONTRACT, ROSTER)
        first_round(made, self.agreed, **changes)
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
    opened, closed = (entry.event for entry in site.log.history.known.values())
    log.tell(opened, Vetoed(participant="b"), closed)
    first_round(log, site.agreed)
    site.close(1)


def fork(site: Site) -> None:
    """Others have cosigned a log in which one of them refused; and that is what the certificate is of."""
    assert site.honest
    site.close(1, certificate(other_with_a_veto(site), 1))


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


def beyond(*leaves: Leaf) -> Callable[[Site], None]:
    """Leaves of a future that nobody has agreed to, below a step's checkpoint."""

    def lie(site: Site) -> None:
        site.honest.tell(*leaves)
        site.log.sign(1)
        site.close(1)

    return lie


INVENTED = {"attempt": 1, "tuple": NOTHING, "digest": NOTHING, "survivors": ("a", "b"), "recovered": ()}
NEXT_ROUND = (
    StepWitnessed(round=1, certificate=NOTHING, witnesses=("a", "b", "c")),
    AttemptOpened(round=2, attempt=1, context=NOTHING, cohort=("a", "b")),
    SumPublished(round=2, **INVENTED),
    RoundClosed(round=2, state_hash=NOTHING),
)


def other_with_a_veto(site: Site) -> Chronicle:
    """Another history, signed by the same coordinator."""
    other = site.other()
    other.tell(Vetoed(participant="b"))
    other.sign(1)
    return other


def twice(site: Site) -> None:
    """It was caught, and goes on as if nothing had been."""
    assert site.honest
    site.witness.follow(1, STATE_1)
    site.link.before = [other_with_a_veto(site)]
    site.close(1)


def void(site: Site) -> None:
    """A dealer is convicted in the log, and in what was published it is not."""
    assert site.honest
    site.close(1)
    announce = replace(OPENED, round=2)
    site.witness.join(announce, CONTEXT)
    site.witness.hear(Void(announce, "no sum", b""))
    site.log.tell(
        site.log.witnessed(1, (site.folder / "audit" / "certificates" / "1").read_bytes()),
        AttemptOpened(round=2, attempt=1, context=CONTEXT.hex(), cohort=site.log.names(MEMBERS)),
        AttemptFailed(round=2, attempt=1, tuple=None),
        RoundVoid(round=2, attempt=1, convicted="b"),
        RoundClosed(round=2, state_hash=STATES[2].hex()),
    )
    site.log.sign(2)
    site.close(2)


def too_few(site: Site) -> None:
    assert site.honest
    site.close(1, certificate(site.log, 1, KEYS[:2]))


def unsigned(site: Site) -> None:
    """A thief of the connection, without the coordinator's log key."""
    log = site.honest
    log.notes[1] = Note(log.notes[1].text).signed(log.key.name, KEYS[3])
    site.witness.follow(1, STATE_1)


Off = list[tuple[object, str, Callable[..., object]]]
ANY_END: Off = [(HistoryOfRun, "stands_at", YES)]
ANY_PAST: Off = [(OwnLog, "cosigned", NO), (witness_module, "check_below", NO)]
LIES: dict[str, tuple[Callable[[Site], None], str, Off]] = {
    "it hides an attempt": (hide(context=NOTHING), "another context", [(witness_module, "check_known", NO)]),
    "it hides what was signed": (hide(tuple=NOTHING), "another tuple", [(witness_module, "check_known", NO)]),
    "it tells of another cohort": (hide(cohort=("a",)), "another cohort", [(witness_module, "check_known", NO)]),
    "it tells of other dropouts": (hide(recovered=()), "another recovered", [(witness_module, "check_known", NO)]),
    "it convicts somebody": (void, "another convicted", [(witness_module, "check_known", NO)]),
    "it tells of an end": (beyond(RunEnded(exit_code=0)), "does not end with step 1", ANY_END),
    "it tells of an adapter": (beyond(ModelExported(adapter=NOTHING)), "does not end with step 1", ANY_END),
    "it tells of a round that is to come": (beyond(*NEXT_ROUND), "does not end with step 1", ANY_END),
    "it tells of another sum": (hide(digest=NOTHING), "another digest", [(witness_module, "check_known", NO)]),
    "it leaves out a survivor": (hide(survivors=("b",)), "another survivors", [(witness_module, "check_known", NO)]),
    "it tells of another state": (hide(state_hash=NOTHING), "another state_hash", [(witness_module, "demand", NO)]),
    "it tells of another certificate": (
        hide(certificate=NOTHING),
        "another certificate",
        [(witness_module, "check_witnesses", NO)],
    ),
    "it tells of other witnesses": (
        hide(witnesses=("a", "b")),
        "another witnesses",
        [(witness_module, "check_witnesses", NO)],
    ),
    "it rewrites what was witnessed": (rewrite, "another one than this site has cosigned", ANY_PAST),
    "it goes on after a fork was found": (twice, "two histories", [(Witness, "_check_same", NO)]),
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


def test_no_restart_makes_a_site_forget_a_fork(site: Site) -> None:
    with pytest.raises(SecurityError):
        twice(site)
    site.link.before = []
    with pytest.raises(SecurityError, match="convicts the coordinator") as caught:
        site.start()
    assert caught.value.culprits == ("coordinator",)


def test_refusing_coordinator_does_not_make_a_site_lose_its_copy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness_module, "_STRIDE", 1)
    assert site.honest
    site.close(1)
    first_round(site.log, certificate(site.log, 1), 2)
    site.close(2)
    before = (site.folder / "audit" / LOG).read_bytes()
    hold = site.link.log

    def refuse(ctx: bytes, request: LogRequest, most_pieces: int) -> tuple[bytes, bytes]:
        if request.step > 1:
            raise SecurityError("no")
        return hold(ctx, request, most_pieces)

    monkeypatch.setattr(site.link, "log", refuse)
    with pytest.raises(SecurityError, match="no"):
        site.witness.follow(3, STATES[3])
    assert (site.folder / "audit" / LOG).read_bytes() == before


def test_second_outcome_of_a_round_is_the_coordinator_s_fault(site: Site) -> None:
    site.witness.hear(OUTCOME)
    with pytest.raises(SecurityError, match="second, different outcome") as caught:
        site.witness.hear(replace(OUTCOME, digest=bytes(32)))
    assert caught.value.culprits == ("coordinator",)


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
    twin.link.chronicle = other_with_a_veto(twin)
    twin.close(1)
    mine, theirs = (read_record(one.folder / "audit") for one in (site, twin))
    assert find_fork(mine, mine, site.log.key) is None
    found = find_fork(mine, theirs, site.log.key)
    assert found
    assert Fork.decode(found.encode()) == found


def test_two_quorums_share_an_honest_witness() -> None:
    """So one that was restored from a backup of all it has, and cosigns a fork, counts towards those who may lie."""
    members, liars = len(CONTRACT.participants), CONTRACT.colluders
    assert 2 * CONTRACT.agreement > members + liars


def test_restored_work_folder_does_not_let_a_witness_cosign_a_fork(site: Site) -> None:
    """What it has cosigned is known by its own log, which lies with the keys."""
    assert site.honest
    site.close(1)
    for path in sorted((site.folder / "audit").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    site.link.chronicle = other_with_a_veto(site)
    site.start()
    with pytest.raises(SecurityError, match="another one than this site has cosigned at step 1"):
        site.close(1)


def test_checkpoint_in_another_s_place_is_not_cosigned(site: Site) -> None:
    """A work folder put together from two backups, and a coordinator that has signed both."""
    assert site.honest
    body = site.witness.witness(1, POSITIONS[1], STATE_1)
    path = site.folder / "audit" / "steps" / "1"
    path.write_bytes(b"spoilt")  # by this machine: then it is got again
    site.start()
    assert site.witness.witness(1, POSITIONS[1], STATE_1) == body
    path.write_bytes(other_with_a_veto(site).notes[1].encode())
    site.start()
    with pytest.raises(SecurityError, match="two histories"):
        site.witness.witness(1, POSITIONS[1], STATE_1)


def test_no_second_state_is_signed_at_a_step_that_was_cosigned(site: Site) -> None:
    assert site.honest
    site.witness.witness(1, POSITIONS[1], STATE_1)
    with pytest.raises(SecurityError, match="another state_hash in round_closed"):
        site.witness.witness(1, POSITIONS[2], STATES[2])


def test_what_was_known_of_rounds_long_past_is_demanded_of_a_log_that_is_got_anew(site: Site) -> None:
    """Away in round 2, the site has the certified log of it; round 3 is then shown on top of another round 2."""
    assert site.honest
    site.close(1)
    agreed = certificate(site.log, 1)
    first_round(site.log, agreed, 2)
    site.witness.hear(replace(OUTCOME, announce=replace(OPENED, round=2)))
    certified = site.witness.check_certificate(2, certificate(site.log, 2), POSITIONS[2], set(MEMBERS))
    site.witness.follow(2, STATES[2], certified.note)
    site.witness.keep_certificate(certified)
    site.link.chronicle = other = site.other()
    first_round(other, agreed, 2, digest=NOTHING)
    first_round(other, certificate(site.log, 2), 3)
    with pytest.raises(SecurityError, match="another digest in sum_published of round 2"):
        site.close(3)


def test_checkpoints_that_are_here_are_held_against_any_log(site: Site) -> None:
    """The own log alone was put back: what it has cosigned since lies in the work folder."""
    backup = shutil.copytree(site.keys, site.keys.parent / "backup")
    assert site.honest
    site.close(1)
    shutil.rmtree(site.keys)
    shutil.move(backup, site.keys)
    before = Chronicle(CONTRACT, ROSTER)
    before.tell(Vetoed(participant="b"))
    first_round(before, site.agreed)
    first_round(before, (site.folder / "audit" / "certificates" / "1").read_bytes(), 2)
    site.link.chronicle = before
    site.start()
    with pytest.raises(SecurityError, match="are not those that were signed"):
        site.close(2)


def test_step_before_one_that_was_cosigned_gets_no_cosignature_any_more(site: Site) -> None:
    assert site.honest
    site.witness.follow(1, STATE_1, site.log.notes[1])
    first_round(site.log, certificate(site.log, 1), 2)
    site.witness.witness(2, POSITIONS[2], STATES[2])
    shutil.rmtree(site.folder / "audit")
    site.link.chronicle = other_with_a_veto(site)
    site.start()
    with pytest.raises(SecurityError, match="has cosigned step 2, not 1"):
        site.witness.witness(1, POSITIONS[1], STATE_1)
