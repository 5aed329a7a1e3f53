import datetime
import json
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpctf_secure.cli.resources import in_short, over_the_run
from mpctf_secure.cli.screen import Screen
from mpctf_secure.monitoring.events import COORDINATOR_KINDS, Event, EventLog
from mpctf_secure.monitoring.resources import Gpu, Resources

GIB = 1 << 30
GPU = Gpu(0, "NVIDIA H200\x1b[2J", 71 * GIB, 80 * GIB, 0.98, 66)
SAMPLE = Resources(0.93, 51 * GIB // 10, 15 * GIB, GIB, 2 * GIB, 0, 0, (GPU,))
SILENT = Gpu(3, "", None, None, None, None)
NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


def fields(sample: Resources, participant: str = "bank-b", node: int = 1) -> dict[str, Any]:
    return {"participant": participant, "node": node, **asdict(sample)}


SHORT = {
    "cpu 93 %  ram 5.1/15 GiB  gpu0 71/80 GiB 98 % 66 °C": [SAMPLE],
    "cpu 93 %  ram 5.1/15 GiB": [replace(SAMPLE, gpus=())],
    "cpu 93 %  ram 5.1/15 GiB  gpu3": [replace(SAMPLE, gpus=(SILENT,))],
    "cpu 50 %  ram 8/16 GiB  gpu0 128/128 GiB 75 %": [
        Resources(
            0.5, 8 * GIB, 16 * GIB, 0, 0, 0, 0, (Gpu(0, "", 128 * GIB, 128 * GIB, 0.75, None),)
        )
    ],
    "2 nodes  cpu 66 %  ram 2005/2015 GiB  4 gpus 142/160 GiB 74 % 70 °C": [
        replace(SAMPLE, gpus=(GPU, replace(GPU, use=0.5, temperature=70))),
        replace(SAMPLE, cpu=0.4, memory_used=2000 * GIB, memory_total=2000 * GIB, gpus=(SILENT, SILENT)),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("text", "samples"), SHORT.items(), ids=SHORT.keys())
def test_in_short(text: str, samples: list[Resources]) -> None:
    assert in_short([fields(sample) for sample in samples]) == text


def test_figures_stand_behind_the_participant_s_bar_and_plain_text_has_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    screen = Screen(quiet=False)
    with screen:
        screen.show(Event("resources", fields(SAMPLE)))
        screen.show(Event("progress", {"participant": "bank-b", "round": 2, "done": 5}))
        screen.show(Event("progress", {"participant": "hospital-a", "round": 2, "done": 6}))
        screen.show(Event("resources", fields(replace(SAMPLE, cpu=0.5), "hospital-a")))
        screen.show(Event("resources", fields(replace(SAMPLE, cpu=1.0), "hospital-a")))
    bank, hospital = shown(screen, 130).splitlines()
    assert "bank-b round 2" in bank
    assert "cpu 93 %  ram 5.1/15 GiB  gpu0 71/80 GiB 98 % 66 °C" in bank
    assert "6/20" in hospital
    assert "cpu 100 %" in hospital
    for line in shown(screen, 80).splitlines():
        assert "/20" in line
        assert "cpu " in line
        assert line.rstrip().endswith("…")
    assert capsys.readouterr().out == ""


def shown(screen: Screen, width: int) -> str:
    text = StringIO()
    Console(width=width, file=text).print(screen._bars.get_renderable())
    return text.getvalue()


def test_report_has_means_and_maxima_of_every_node_whatever_process_wrote_the_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for cpu, used in ((0.25, 9), (0.75, 7)):
        log = EventLog(path, COORDINATOR_KINDS, lambda: NOW)
        log.record("round_started", round=1)
        log.record("refused", participant="bank-b", reason='"event": "resources"')
        second = replace(GPU, index=1, memory_used=used * GIB, use=0.5)
        log.record("resources", **fields(replace(SAMPLE, cpu=cpu, memory_used=used * GIB, gpus=(GPU, second))))
        log.record("resources", **fields(replace(SAMPLE, gpus=(SILENT,)), node=12))
        log.record("resources", **fields(replace(SAMPLE, gpus=()), "hospital-a"))
        log.close()
    used = {"samples": 2, "cpu_mean": 0.93, "memory_used_max": SAMPLE.memory_used}
    others = {"disk_free_min": SAMPLE.disk_free, "sent_max": SAMPLE.sent, "received_max": SAMPLE.received}
    nothing = {"gpu_use_mean": None, "gpu_memory_used_max": None}
    found = over_the_run(path)
    assert found == {
        "bank-b": [
            {
                "node": 1, "samples": 2, "cpu_mean": 0.5, "memory_used_max": 9 * GIB,
                "gpu_use_mean": 0.74, "gpu_memory_used_max": 71 * GIB, **others,
            },
            {"node": 12, **used, **nothing, **others},
        ],
        "hospital-a": [{"node": 1, **used, **nothing, **others}],
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found
