import datetime
import json
import math
import re
import resource
from pathlib import Path

import pytest

from mpctf_secure.cli import join, screen
from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.monitoring import events
from mpctf_secure.monitoring.events import COORDINATOR_KINDS, SITE_KINDS, Event, EventLog

PACKAGE = Path(events.__file__).parents[1]
NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


def opened(folder: Path) -> EventLog:
    return EventLog(folder / "events.jsonl", COORDINATOR_KINDS, lambda: NOW)


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_event_is_in_the_file_before_anybody_is_told(tmp_path: Path) -> None:
    log, told = opened(tmp_path), []
    log.listeners.append(lambda event: told.append((event, len(lines(tmp_path)))))
    log.record("round_started", round=1)
    assert told == [(Event("round_started", {"round": 1}), 1)]
    assert lines(tmp_path) == [{"time": "2030-01-01T00:00:00.000+00:00", "event": "round_started", "round": 1}]
    with pytest.raises(ValueError, match="unknown kind"):
        log.record("lunch")


def test_every_kind_is_recorded_somewhere_and_has_a_line_or_none() -> None:
    for kinds, room in ((COORDINATOR_KINDS, "coordinator"), (SITE_KINDS, "participant")):
        sources = [*(PACKAGE / room).glob("*.py"), PACKAGE / "cli" / "start.py"]
        text = "".join(path.read_text() for path in sources)
        recorded = set(re.findall(r'(?:tell|record|_record)\(\s*"(\w+)"', text))
        assert kinds <= recorded | {"run_ended", "run_interrupted"}
    assert join._TEXTS.keys() <= SITE_KINDS
    assert screen._TEXTS.keys() | screen._QUIET | {"progress", "resources"} == COORDINATOR_KINDS


def test_what_a_power_cut_left_of_a_line_goes(tmp_path: Path) -> None:
    opened(tmp_path).record("round_started", round=1)
    with (tmp_path / "events.jsonl").open("a") as stream:
        stream.write('{"time": "2030-01-0')
    opened(tmp_path).record("round_started", round=2)
    assert [line["round"] for line in lines(tmp_path)] == [1, 2]


def test_line_that_the_disk_has_no_room_for_is_not_half_there(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.record("round_started", round=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "events.jsonl").stat().st_size + 10, before[1]))
    try:
        with pytest.raises(EnvironmentUnfitError, match=r"events\.jsonl: No space left"):
            log.record("round_started", round=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.record("round_started", round=3)
    assert [line["round"] for line in lines(tmp_path)] == [1, 3]


def test_loss_that_is_no_number_is_null_in_the_file_and_as_it_is_to_listeners(tmp_path: Path) -> None:
    told: list[Event] = []
    log = EventLog(tmp_path / "events.jsonl", SITE_KINDS, lambda: NOW)
    log.listeners.append(told.append)
    log.record("round_trained", loss=math.nan, held_out={"loss_after": math.inf, "sent_step": 3})
    log.close()
    line = json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["held_out"]) == (None, {"loss_after": None, "sent_step": 3})
    assert math.isnan(told[0].fields["loss"])
