import json
import os
import subprocess
import sys

import pytest

from mpctf_secure.attestation import hardening

BECOME_NOBODY = "import ctypes, os; from mpctf_secure.attestation.hardening import harden; os.setresuid(*[65534] * 3)"
# The kernel makes a process undumpable when it changes its user, so that is undone: what is left is our own doing.
VICTIM = BECOME_NOBODY + "; ctypes.CDLL(None).prctl(4, 1); {}; print('up', flush=True); input()"
SPY = BECOME_NOBODY + "; open('/proc/{}/mem', 'rb')"


def test_every_command_is_protected_and_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mpctf_secure", "harden", "--format", "json"], check=True, stdout=subprocess.PIPE
    )
    protections = json.loads(done.stdout)
    assert {one["name"]: one["in_force"] for one in protections} == {
        "not dumpable": True,
        "no core files": True,
        "no new privileges": True,
    }


def test_an_unprotected_process_is_reported_as_such() -> None:
    """This one: pytest hardens nothing."""
    assert not all(one.in_force for one in hardening.read_back())


@pytest.mark.skipif(os.getuid() != 0, reason="two processes of a third user are started")
@pytest.mark.parametrize("harden", [True, False])
def test_another_process_of_the_same_user_cannot_read_the_memory_of_a_protected_one(harden: bool) -> None:
    code = VICTIM.format("harden()" if harden else "pass")
    victim = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert victim.stdout
        assert victim.stdout.readline() == b"up\n"
        spy = subprocess.run([sys.executable, "-c", SPY.format(victim.pid)], stderr=subprocess.PIPE, check=False)
        assert (spy.returncode != 0) == harden
        assert (b"PermissionError" in spy.stderr) == harden
    finally:
        victim.kill()
        victim.communicate()
