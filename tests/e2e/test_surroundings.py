"""In the middle of a run: a full disk, a clock that jumps, a second machine with one site's keys, Ctrl-C."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.consortium import COORDINATOR, FOUR, ROUNDS, THREE, assert_complete, consortium

from mpctf_secure import files

pytestmark = pytest.mark.slow
HOUR = 3600


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 64 MiB at `folder`; gives the file to fill it with."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root, to mount a small disk")
    try:
        yield folder / "filler"
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(filler: Path) -> None:
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass


@pytest.mark.parametrize("who", [COORDINATOR, THREE[0]])
def test_full_disk_is_named_and_with_room_again_the_run_goes_on(tmp_path: Path, undisturbed: str, who: str) -> None:
    with consortium(tmp_path / "joint", THREE, rounds=ROUNDS) as joint:
        work = joint.root / who / ("runs" if who == COORDINATOR else "work")
        with small_disk(work) as filler:
            joint.begin()
            joint.wait_for_event("round_started", 2)
            fill(filler)
            joint.end(who, 3)
            assert "No space left on device" in joint.log(who) or "disk is full" in joint.log(who)
            filler.unlink()
            if who == COORDINATOR:
                joint.coordinator(resume=True)
            else:
                joint.site(who, once=True)
            joint.end_well()
            assert joint.adapter() == undisturbed
            assert joint.site_adapters() == {undisturbed}


def set_clock(path: Path, seconds: int) -> None:
    """At once: others read it all the time."""
    files.replace(path, str(seconds).encode())


@pytest.mark.parametrize("who", [COORDINATOR, THREE[0]])
@pytest.mark.parametrize("jump", [-2 * HOUR, 72 * HOUR])
def test_clock_that_jumps_and_is_set_right_changes_nothing(
    tmp_path: Path,
    undisturbed: str,
    who: str,
    jump: int,
) -> None:
    with consortium(tmp_path / "joint", THREE, rounds=ROUNDS) as joint:
        clock = tmp_path / "clock"
        set_clock(clock, 0)
        joint.environment[who] = {"CLOCK_FILE": str(clock)}
        joint.begin()
        joint.wait_for_event("round_started", 1)
        set_clock(clock, jump)
        until = time.monotonic() + 10  # a coordinator in the past refuses everybody until its clock is set right
        joint.wait_for(lambda: time.monotonic() > until or "round_finished" in str(joint.events()))
        set_clock(clock, 0)
        joint.end_well()
        assert joint.adapter() == undisturbed
        assert_complete(joint)


def test_second_machine_with_a_sites_keys_puts_that_site_out_and_the_others_go_on(tmp_path: Path) -> None:
    with consortium(tmp_path / "joint", FOUR, rounds=2) as joint:
        twin = "bank-b-twin"
        shutil.copytree(joint.root / "bank-b", joint.root / twin)
        joint.coordinator()
        for name in (*FOUR, twin):
            joint.site(name, once=True)
        for name in (COORDINATOR, *FOUR[1:]):
            joint.end(name, 0)
        for name in (FOUR[0], twin):
            joint.end(name, 4)
        logs = joint.log(FOUR[0]) + joint.log(twin)
        assert "hint: does another machine use the same keys?" in logs
        assert "is out of this run: refused: a second, different " in logs
        assert [record["survivors"] for record in joint.report()["rounds"]][-1] == list(FOUR[1:])


def test_ctrl_c_at_either_end_ends_with_7_and_the_run_goes_on(tmp_path: Path, undisturbed: str) -> None:
    with consortium(tmp_path / "joint", THREE, rounds=ROUNDS) as joint:
        joint.begin()
        joint.wait_for_event("round_started", 1)
        for who in (THREE[0], COORDINATOR):
            joint.processes[who].send_signal(signal.SIGINT)
            joint.end(who, 7)
            assert "Traceback" not in joint.log(who)
        joint.coordinator(resume=True)
        joint.site(THREE[0], once=True)
        joint.end_well()
        assert joint.adapter() == undisturbed
        assert_complete(joint)
