"""Processes killed, machines rebooted, networks cut: the run goes on, and its result is that of an undisturbed one."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
from e2e.consortium import COORDINATOR, FOUR, ROUNDS, THREE, Death, assert_complete, consortium
from e2e.machines import ADDRESS, Machines, lacking
from e2e.proxy import Network

from mpctf_secure.privacy.ledger import Ledger

JOURNAL = "mpctf_secure.coordinator.journal:Journal"
COORDINATOR_DEATHS: list[Death] = [
    (f"{JOURNAL}.add", 1, "after"),  # one site's facts are in
    (f"{JOURNAL}.add", 5, "before"),  # the contract is out, not all have accepted
    (f"{JOURNAL}.add", 6, "after"),  # ready
    (f"{JOURNAL}.add", 7, "after"),  # training is closed, nobody was told
    (f"{JOURNAL}.add", 6, "before"),  # dealings
    ("mpctf_secure.coordinator.spool:Spool.keep", 1, "after"),  # an upload is on disk, its message is not
    (f"{JOURNAL}.add", 5, "after"),  # signatures
    ("mpctf_secure.coordinator.spool:Spool.write_sum", 0, "after"),  # the sum is on disk
    (f"{JOURNAL}.add", 2, "after"),  # transitions
    (f"{JOURNAL}.finish", 0, "before"),
    (f"{JOURNAL}.finish", 0, "after"),
]


@pytest.mark.parametrize(
    ("deaths", "with_it"),
    [
        (COORDINATOR_DEATHS[3::4], ()),
        pytest.param(COORDINATOR_DEATHS, (), marks=pytest.mark.slow),
        pytest.param(COORDINATOR_DEATHS, THREE, marks=pytest.mark.slow),
    ],
)
def test_coordinator_killed_at_every_stage_ends_with_the_same_adapter(
    tmp_path: Path, undisturbed: str, deaths: list[Death], with_it: tuple[str, ...]
) -> None:
    """Alone, and with everybody else."""
    with consortium(tmp_path / "joint", THREE, rounds=ROUNDS) as joint:
        for name in THREE:
            joint.site(name, once=True)
        for number, death in enumerate(deaths):
            joint.coordinator(death, resume=number > 0)
            joint.end(COORDINATOR, -9)
            for name in with_it:
                joint.kill(name)
                joint.site(name, once=True)
        joint.coordinator(resume=True)
        joint.end_well()
        assert joint.adapter() == undisturbed
        assert joint.site_adapters() == {undisturbed}
        assert_complete(joint)


STORE, FILE = "mpctf_secure.participant.store:Store", "mpctf_secure.participant.round_file:RoundFile"
SITE_DEATHS: list[Death] = [
    (f"{STORE}.accept", 0, "after"),  # the contract is on disk, the signature has not left
    ("mpctf_secure.identity.keystore:note_joined", 0, "after"),  # the round counts as joined, nothing has left
    (f"{FILE}.append", 0, "after"),  # input and entropy are sealed
    (f"{FILE}.append", 2, "after"),  # the delivery, before the upload
    (f"{FILE}.append", 3, "after"),  # the release, before it leaves
    (f"{STORE}.keep", 0, "before"),  # the sum is there, the next state is not
    (f"{STORE}.keep", 0, "after"),  # the state is on disk, nobody knows
    (f"{STORE}.certify", 0, "before"),  # the quorum's signatures came
    (f"{STORE}.certify", 0, "after"),  # the round's key is still there
]


@pytest.mark.parametrize(
    ("deaths", "dying"),
    [
        (SITE_DEATHS[2::4], THREE[:1]),
        pytest.param(SITE_DEATHS, THREE[:1], marks=pytest.mark.slow),
        pytest.param(SITE_DEATHS, THREE[:2], marks=pytest.mark.slow),
    ],
)
def test_site_killed_at_every_stage_ends_with_the_same_adapter(
    tmp_path: Path, undisturbed: str, deaths: list[Death], dying: tuple[str, ...]
) -> None:
    """One, and two: of three all are needed, each time the others wait until it is back, and no round is void."""
    with consortium(tmp_path / "joint", THREE, rounds=ROUNDS) as joint:
        joint.coordinator()
        for name in set(THREE) - set(dying):
            joint.site(name, once=True)
        for death in deaths:
            for name in dying:
                joint.site(name, death, once=True)
            for name in dying:
                joint.end(name, -9)
        for name in dying:
            joint.site(name, once=True)
        joint.end_well()
        assert joint.adapter() == undisturbed
        assert joint.site_adapters() == {undisturbed}
        assert_complete(joint)


@pytest.mark.slow
def test_site_that_missed_rounds_catches_up_and_takes_part_again(tmp_path: Path) -> None:
    """Of four one dies before its upload: the others finish that round and another one without it."""
    stages = {"join": 120, "training": 120, "stage": 5, "absence": 120}
    with consortium(tmp_path / "joint", FOUR, rounds=5, timeouts=stages) as joint:
        joint.coordinator()
        for name in FOUR[1:]:
            joint.site(name, once=True)
        joint.site(FOUR[0], (f"{FILE}.append", 2, "after"), once=True)
        joint.end(FOUR[0], -9)
        joint.wait_for_event("round_finished", 2)
        joint.site(FOUR[0], once=True)
        joint.end_well()
        rounds = joint.report()["rounds"]
        assert [record["survivors"] for record in rounds[:2]] == [list(FOUR[1:])] * 2
        assert rounds[0]["dropouts"] == [
            {"participant": "bank-b", "stage": "masked input", "reason": "nothing came for 5 s"}
        ]
        assert list(FOUR) in [record["survivors"] for record in rounds[2:]]
        assert "catches up from round 0 to" in joint.log(FOUR[0])
        assert joint.site_adapters() == {joint.adapter()}


def test_network_that_is_cut_and_heals_changes_nothing(tmp_path: Path, undisturbed: str) -> None:
    with consortium(tmp_path / "joint", THREE, rounds=ROUNDS) as joint, Network(joint.address) as network:
        joint.write_site(THREE[0], network.address)
        joint.begin()
        for count in range(1, ROUNDS):
            joint.wait_for_event("round_started", count)
            with network.down():
                joint.wait_for(lambda: joint.log(THREE[0]), 5)
        joint.end_well()
        assert joint.adapter() == undisturbed
        assert_complete(joint)


def test_site_that_refuses_the_run_says_why_and_nobody_waits(tmp_path: Path) -> None:
    with consortium(tmp_path / "joint", THREE, rounds=1) as joint:
        path = tmp_path / "joint" / THREE[0] / "site.yaml"
        path.write_text(path.read_text().replace("smallest_sum: 2", "smallest_sum: 4"))
        joint.begin()
        joint.end(COORDINATOR, 5)
        joint.end(THREE[0], 4)
        reason = "bank-b (refuses: proposal: a sum of 3 could be opened, this site's policy.smallest_sum is 4"
        assert reason in joint.report()["exit"]["reason"]
        assert "smallest_sum is 4" in joint.log(THREE[0])


@pytest.mark.slow
def test_slow_link_that_is_cut_again_and_again_finishes(tmp_path: Path, undisturbed: str) -> None:
    """1 Mbit/s, 300 ms there and back, and a connection ends after some 40 kilobytes, about an upload."""
    stages = {"join": 120, "training": 120, "stage": 120, "absence": 120}
    with (
        consortium(tmp_path / "joint", THREE, rounds=ROUNDS, timeouts=stages) as joint,
        Network(joint.address, bytes_a_second=1.25e5, delay=0.15, cut_every=40_000, seed=1) as network,
    ):
        joint.write_site(THREE[0], network.address)
        joint.begin()
        joint.end_well()
        assert network.cuts > ROUNDS
        assert joint.adapter() == undisturbed
        assert_complete(joint)


@pytest.mark.slow
def test_run_whose_quorum_went_away_is_gone_on_with_when_it_is_back(tmp_path: Path, undisturbed: str) -> None:
    """Exit 5 is not the end: those who are in stay in, and wait."""
    stages = {"join": 120, "training": 120, "stage": 60, "absence": 2}
    with consortium(tmp_path / "joint", THREE, rounds=ROUNDS, timeouts=stages) as joint:
        joint.coordinator()
        for name in THREE[1:]:
            joint.site(name, once=True)
        joint.site(THREE[0], (f"{STORE}.certify", 0, "after"), once=True)
        joint.end(THREE[0], -9)
        joint.end(COORDINATOR, 5)
        assert joint.report()["exit"]["reason"].startswith("round 2: 2 of 3 participants are left")
        joint.site(THREE[0], once=True)
        joint.coordinator(resume=True)
        joint.end_well()
        assert joint.adapter() == undisturbed
        assert joint.site_adapters() == {undisturbed}


@pytest.mark.slow
def test_run_over_machines_one_of_which_is_rebooted_ends_with_the_same_adapter(
    tmp_path: Path, undisturbed: str
) -> None:
    """No connection of the dead machine is ever closed: the coordinator has to notice by itself."""
    if reason := lacking():
        pytest.skip(reason)
    with (
        Machines(COORDINATOR, THREE) as machines,
        consortium(tmp_path / "joint", THREE, rounds=ROUNDS, listen=f"{ADDRESS}:8443") as joint,
    ):
        joint.prefix = machines.prefix
        joint.begin()
        joint.wait_for_event("round_started", 2)
        machines.reboot(THREE[1])
        joint.end(THREE[1], -9)
        joint.site(THREE[1], once=True)
        joint.end_well()
        assert joint.adapter() == undisturbed
        assert joint.site_adapters() == {undisturbed}
        assert_complete(joint)


@pytest.mark.slow
def test_site_that_was_away_at_the_end_gets_the_last_state_later(tmp_path: Path, undisturbed: str) -> None:
    """`runs resume` of a run that is done; a site that knows the end already needs nothing."""
    stages = {"join": 120, "training": 120, "stage": 5, "absence": 60}
    with consortium(tmp_path / "joint", THREE, rounds=ROUNDS, timeouts=stages) as joint:
        joint.coordinator()
        for name in THREE[1:]:
            joint.site(name, once=True)
        joint.site(THREE[0], (f"{STORE}.certify", ROUNDS - 1, "before"), once=True)
        joint.end(THREE[0], -9)
        joint.end(COORDINATOR, 0)
        joint.site(THREE[0], once=True)
        before = joint.report()
        joint.coordinator(resume=True)
        joint.end(THREE[0], 0)
        assert joint.site_adapters() == {undisturbed}
        joint.processes[COORDINATOR].send_signal(signal.SIGINT)  # the two others need not ask again
        joint.end(COORDINATOR, 7)
        joint.serve_the_end()
        joint.processes[COORDINATOR].send_signal(signal.SIGTERM)
        joint.end(COORDINATOR, 7)
        joint.serve_the_end()
        joint.command(COORDINATOR, "runs", "stop", joint.run_folder.name)
        joint.end(COORDINATOR, 0)
        joint.serve_the_end()  # what stopped one does not stop the next
        assert joint.report() == before


@pytest.mark.slow
def test_stop_reaches_sites_that_train(tmp_path: Path) -> None:
    """Else `join --once` would wait for ever for a coordinator that will not come back."""
    with consortium(
        tmp_path / "joint", THREE, rounds=1, training={"learning_rate": 3e-3, "max_length": 128, "local_epochs": 100}
    ) as joint:
        joint.begin()
        joint.wait_for_event("round_started")
        joint.command(COORDINATOR, "runs", "stop", joint.run_folder.name)
        joint.end(COORDINATOR, 7)
        for name in THREE:
            joint.end(name, 7, 30)
            assert "the coordinator ended the run: stopped by its operator" in joint.log(name)


@pytest.mark.slow
def test_run_that_is_killed_when_all_is_done_has_an_adapter_to_be_written(tmp_path: Path) -> None:
    with consortium(tmp_path / "joint", THREE, rounds=1) as joint:
        joint.coordinator((f"{JOURNAL}.end", 0, "before"))
        for name in THREE:
            joint.site(name, once=True)
        joint.end(COORDINATOR, -9)
        with pytest.raises(subprocess.CalledProcessError):  # `stop` would leave it without
            joint.command(COORDINATOR, "runs", "stop", joint.run_folder.name)
        joint.coordinator(resume=True)
        joint.end_well()
        assert joint.site_adapters() == {joint.adapter()}


@pytest.mark.slow
def test_run_that_is_killed_when_it_has_ended_has_its_log_closed_by_the_next_start(tmp_path: Path) -> None:
    with consortium(tmp_path / "joint", THREE, rounds=1) as joint:
        joint.coordinator((f"{JOURNAL}.end", 0, "after"))
        for name in THREE:
            joint.site(name, once=True)
        joint.end(COORDINATOR, -9)
        verify = (COORDINATOR, "audit", "verify", str(joint.run_folder / "audit"), "--format", "json")
        assert json.loads(joint.command(*verify))[0]["exit_code"] is None  # it is in no signed leaf
        joint.coordinator(resume=True)
        joint.wait_for(lambda: "who have not heard of its end" in joint.log(COORDINATOR))
        assert json.loads(joint.command(*verify))[0]["exit_code"] == 0


@pytest.mark.slow
def test_agents_wait_for_the_next_run_and_end_with_a_signal(tmp_path: Path) -> None:
    with consortium(tmp_path / "joint", THREE, rounds=1) as joint:
        for name in THREE:
            joint.site(name)
        for _ in range(2):
            joint.coordinator()
            joint.end(COORDINATOR, 0)
        for name in THREE:
            joint.wait_for(lambda name=name: joint.log(name).count("is over; the adapter") == 2, 30)
            joint.processes[name].send_signal(signal.SIGTERM)
            joint.end(name, 7, 30)


SUM, CHARGE = "mpctf_secure.coordinator.spool:Spool.write_sum", "mpctf_secure.privacy.ledger:Ledger.charge"


@pytest.mark.slow
def test_noise_is_drawn_once_and_charged_once_whoever_is_killed(tmp_path: Path) -> None:
    """A coordinator that has written a noised sum, and one that was about to; a site between its charge and upload."""
    privacy = {
        "strategy": "server_adaptive",
        "noise_multiplier": 1.0,
        "clip_norm": 0.5,
        "record_dpsgd": {"epsilon": 8, "clip_norm": 0.1},
    }
    with consortium(tmp_path / "joint", THREE, rounds=2, privacy=privacy) as joint:
        joint.coordinator((SUM, 0, "after"))
        joint.site(THREE[0], (CHARGE, 0, "after"), once=True)
        for name in THREE[1:]:
            joint.site(name, once=True)
        joint.end(THREE[0], -9)
        joint.site(THREE[0], once=True)
        joint.end(COORDINATOR, -9)
        (path,) = joint.run_folder.rglob("round-1.sum")
        first = path.read_bytes()
        joint.coordinator((SUM, 0, "before"), resume=True)
        joint.end(COORDINATOR, -9)
        joint.coordinator((SUM, 0, "after"), resume=True)
        joint.end(COORDINATOR, -9)
        assert path.read_bytes() == first
        joint.coordinator(resume=True)
        joint.end_well()
        assert joint.site_adapters() == {joint.adapter()}
        for name in THREE:
            charges = Ledger(joint.root / name / "keys").charges()
            assert [charge.round for charge in charges] == [1, 2]
            assert all(charge.dpsgd and charge.against == "participants" for charge in charges)
