import shutil
from pathlib import Path

import numpy as np
import pytest
from simulator import Attempt

from mpctf_secure.coordinator.spool import Spool, Upload
from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.secagg.chunks import digest


def test_sum_from_disk_is_exact_and_its_digest_is_over_its_chunks(tmp_path: Path) -> None:
    attempt = Attempt(4, bits=16, dimension=(1 << 19) + 3, drops={2: "upload"})
    left = attempt.release(attempt.confirm(attempt.upload(attempt.share(attempt.advertise()))))
    spool = Spool(tmp_path / "spool", attempt.context)
    for owner, chunks in attempt.uploads.items():
        path = tmp_path / "spool" / "arrived.part"
        path.write_bytes(b"".join(chunks))
        with spool.holding(owner, Upload(path, b"", b"", 0)):
            spool.keep(owner)
    target = tmp_path / "sum"
    seen = spool.write_sum(target, spool.opened(attempt.server.survivors, left))
    lanes, scalars = spool.load_sum(target)
    assert np.array_equal(lanes, attempt.plain()[0])
    assert np.array_equal(scalars, attempt.plain()[1])
    chunks = list(spool.read_sum(target, 0))
    assert seen == digest(map(sha256, chunks))
    for first in range(len(chunks) + 2):
        assert list(spool.read_sum(target, first)) == chunks[first:]
    spool.clear()
    assert not (tmp_path / "spool").exists()


def test_disk_that_is_full_when_the_sum_is_written_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    attempt = Attempt(3)
    left = attempt.release(attempt.confirm(attempt.upload(attempt.share(attempt.advertise()))))
    spool = Spool(tmp_path / "spool", attempt.context)
    for owner, chunks in attempt.uploads.items():
        path = tmp_path / "spool" / "arrived.part"
        path.write_bytes(b"".join(chunks))
        with spool.holding(owner, Upload(path, b"", b"", 0)):
            spool.keep(owner)
    with pytest.raises(EnvironmentUnfitError, match="/dev/full: No space left"):
        spool.write_sum(Path("/dev/full"), spool.opened(attempt.server.survivors, left))


def test_round_that_does_not_fit_on_the_disk_says_so_before_it_begins(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100))  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentUnfitError, match="are free"):
        Spool(tmp_path / "spool", Attempt(4).context)


def test_restart_keeps_uploads_and_what_came_of_others(tmp_path: Path) -> None:
    attempt = Attempt(3)
    folder, owner = tmp_path / "spool", attempt.context.cohort[0]
    spool = Spool(folder, attempt.context)
    (folder / "whole.part").write_bytes(b"x")
    (folder / f"{attempt.context.cohort[1].hex()}.part").write_bytes(bytes(7))
    with spool.holding(owner, Upload(folder / "whole.part", b"", b"", 0)):
        spool.keep(owner)
    again = Spool(folder, attempt.context)
    again.keep(owner)  # a message from the journal: its upload is there
    assert sorted(path.suffix for path in folder.iterdir()) == [".masked", ".part"]
    assert again.held(attempt.context.cohort[1]) == 0  # not one whole chunk of it
