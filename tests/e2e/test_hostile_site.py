"""An admitted site that sends what none may: it is refused, the operator reads its name, and the others go on."""

import os
from pathlib import Path
from typing import Any

import grpc
import pytest
from e2e.harness import RealRun
from e2e.test_attempts_and_voids import assert_exact

from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.participant.rounds import Participant
from mpctf_secure.rounds.messages import Fetch, Position
from mpctf_secure.secagg.messages import Signed
from mpctf_secure.transport.service import DOWNLOAD, EXCHANGE, UPLOAD

OTHER = bytes(32)
ATTEMPT_LABELS = ("advert", "shares", "complaint", "consistency", "release")


def test_messages_that_none_may_send_are_refused_at_every_method_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RealRun(tmp_path, ["rounds=1", "timeouts.training=60", "timeouts.stage=60"], monkeypatch, training=False)
    original, answers = Participant.run, dict[str, str]()

    def hostile_run(site: Participant) -> Any:
        if site._name == "site-4":
            for what, (method, message) in messages(site).items():
                answers[what] = answer(site, method, message)
        return original(site)

    monkeypatch.setattr(Participant, "run", hostile_run)
    outcome = run.run()
    assert answers.pop("a veto for another roster") == "noted"  # and without effect
    assert answers.pop("a hello with another roster") == "proposal"  # it is in the run, whatever it has by now
    assert [what for what, said in answers.items() if said not in {"refused", "skip", "abort"}] == []
    assert answers["a stage of no attempt: release"] == "skip"
    assert answers["a ready of another run"] == "abort"
    assert answers["a state of its own"] == "refused"  # and out: all before it did no harm
    told = [event for event in outcome.events if event["event"] == "refused"]
    assert {event["participant"] for event in told} == {"site-4"}
    assert 1 < len(told) <= 10
    assert outcome.coordinator.ledger.rounds[0].dropouts[0]["participant"] == "site-4"
    assert_exact(outcome, 1, ["site-1", "site-2", "site-3"])


def messages(site: Participant) -> dict[str, tuple[str, Any]]:
    """By what is wrong with it; the last one ends this site's part in the run."""
    key, run = site._key, site._contract.run_context
    roster = bytes.fromhex(site._contract.roster_hash)

    def envelope(label: str, ctx: bytes, body: bytes = b"", signed_for: bytes | None = None) -> bytes:
        return enc(label, ctx, Signed.make(label, ctx if signed_for is None else signed_for, key, body).encode())

    def asking(label: str, body: bytes) -> bytes:
        return Signed.make(label, run, key, body).encode()

    position = Position(1, OTHER)
    stages = {
        f"a stage of no attempt: {label}": (EXCHANGE, envelope(label, OTHER))
        for label in ATTEMPT_LABELS
        if label != "shares"  # has its signed part inside
    }
    return {
        "nothing": (EXCHANGE, b""),
        "noise": (EXCHANGE, os.urandom(200)),
        "a length without end": (EXCHANGE, b"\xff" * 64),
        "more than a message may have": (EXCHANGE, bytes(5 << 20)),
        "an unknown label": (EXCHANGE, envelope("please", run)),
        "a hello with another roster": (EXCHANGE, envelope("hello", OTHER)),
        "a veto for another roster": (EXCHANGE, envelope("veto", OTHER, b"no")),
        "a hello signed for something else": (EXCHANGE, envelope("hello", roster, signed_for=OTHER)),
        "progress that is none": (EXCHANGE, envelope("progress", run, b"\1")),
        "resources that are none": (EXCHANGE, envelope("resources", run, b"\1")),
        "a ready of another run": (EXCHANGE, envelope("ready", OTHER, position.encode())),
        "a transition of a later round": (EXCHANGE, envelope("transition", run, Position(9, OTHER).encode())),
        "shares that are none": (EXCHANGE, enc("shares", OTHER, b"")),
        **stages,
        "an upload of nothing": (UPLOAD, []),
        "an upload that opens with noise": (UPLOAD, [os.urandom(50)]),
        "an upload for no attempt": (UPLOAD, [enc(OTHER, 100, 0), bytes(100)]),
        "a question that is none": (DOWNLOAD, os.urandom(50)),
        "a question about a later round": (DOWNLOAD, asking("fetch", Fetch(Position(9, OTHER)).encode())),
        "a question without a body": (DOWNLOAD, asking("fetch", b"")),
        "a state asked for without a body": (DOWNLOAD, asking("behind", b"")),
        "another label to download": (DOWNLOAD, asking("hello", b"")),
        "a state of its own": (EXCHANGE, envelope("ready", run, position.encode())),
    }


def answer(site: Participant, method: str, message: Any) -> str:
    """The label of the reply, or that there was none."""
    kind = {EXCHANGE: "unary_unary", UPLOAD: "stream_unary", DOWNLOAD: "unary_stream"}[method]
    call = site._link._channel._method(kind, method)
    try:
        reply = call(iter(message) if method == UPLOAD else message, timeout=20)
        return Signed.decode(next(iter(reply)) if method == DOWNLOAD else reply).label
    except grpc.RpcError as error:
        refusals = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        return "refused" if error.code() in refusals else str(error)
