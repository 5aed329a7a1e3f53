from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mpctf_secure.config import load
from mpctf_secure.config.site import Sharing, SiteConfig
from mpctf_secure.errors import UsageError
from mpctf_secure.monitoring.resources import Gpu, Resources, coarsen
from mpctf_secure.monitoring.usage import Usage
from mpctf_secure.participant.sharing import ResourceSharing

SAMPLE = Resources(0.4, *[3 << 30] * 4, 1000, 0, (Gpu(0, "NVIDIA H200", 9 << 30, 141 << 30, 0.4, 61),))
OTHER = replace(SAMPLE, cpu=0.9)


class Site:
    def __init__(self, share: Sharing) -> None:
        self.now = 0.0
        self.recorded: list[dict[str, object]] = []
        self.told: list[dict[int, Resources]] = []
        self.sharing = ResourceSharing(
            share,
            lambda kind, **fields: self.recorded.append({"kind": kind, **fields}),
            lambda body: self.told.append(dict(Usage.decode(body).nodes)),
            lambda: self.now,
        )

    def note(self, now: float, samples: dict[int, Resources]) -> None:
        self.now = now
        self.sharing.note(samples)


def test_site_keeps_a_sample_of_each_node_every_30_seconds() -> None:
    site = Site("off")
    for now in range(0, 70, 5):
        site.note(now, {1: SAMPLE, 2: OTHER} if now >= 10 else {1: SAMPLE})
    assert [event["node"] for event in site.recorded] == [1, 2, 1, 2, 1]
    assert site.recorded[0] == {"kind": "resources", "node": 1, **asdict(SAMPLE)}


def test_coordinator_is_told_every_15_seconds_of_nodes_that_have_something_new() -> None:
    site = Site("exact")
    site.note(0, {1: SAMPLE})
    site.note(5, {1: SAMPLE, 2: SAMPLE})
    site.note(10, {1: OTHER})
    site.note(15, {})
    site.note(30, {1: SAMPLE})
    assert site.told == [{1: SAMPLE}, {1: OTHER, 2: SAMPLE}, {1: SAMPLE}]


@pytest.mark.parametrize(("share", "told"), [("off", []), ("coarse", [{1: coarsen(SAMPLE)}]), ("exact", [{1: SAMPLE}])])
def test_site_decides_what_is_told(share: Sharing, told: list[dict[int, Resources]]) -> None:
    site = Site(share)
    site.note(0, {1: SAMPLE})
    assert site.told == told
    assert site.recorded == [{"kind": "resources", "node": 1, **asdict(SAMPLE)}]


@pytest.mark.parametrize(("said", "share"), [("off", "off"), ("'off'", "off"), ("exact", "exact"), (None, "coarse")])
def test_site_file_says_it_with_or_without_quotes(tmp_path: Path, said: str | None, share: str) -> None:
    policy = f"policy: {{share_resources: {said}}}\n" if said else ""
    (tmp_path / "site.yaml").write_text(f"coordinator: 127.0.0.1:1\nmodel: m\ndata: d\n{policy}")
    site = load.load(tmp_path / "site.yaml", SiteConfig)
    assert site.policy.share_resources == share
    (tmp_path / "again.yaml").write_text(load.dump(site))
    assert load.load(tmp_path / "again.yaml", SiteConfig) == site


def test_no_other_word_is_taken(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        "coordinator: 127.0.0.1:1\nmodel: m\ndata: d\npolicy: {share_resources: true}\n"
    )
    with pytest.raises(UsageError, match=r"policy\.share_resources"):
        load.load(tmp_path / "site.yaml", SiteConfig)
