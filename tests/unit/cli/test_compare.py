import json
from pathlib import Path

from samples import make_contract

from mpctf_secure.cli.compare import _slices
from mpctf_secure.config.training import Training
from mpctf_secure.partition.held_out import divide


def test_what_is_compared_is_trained_on_the_rows_of_the_file_that_the_participant_trained_on(tmp_path: Path) -> None:
    data, work = tmp_path / "a.jsonl", tmp_path / "sites" / "a" / "work"
    data.write_text("".join(json.dumps({"text": f"words {row}"}) + "\n" for row in range(20)))
    work.mkdir(parents=True)
    events = [{"event": "round_trained", "turn": turn, "rows": 8} for turn in (1, 2)]
    (work / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    contract = make_contract(training=Training(validation=0.2))
    first, second = _slices(contract, "a", data, tmp_path)["rounds"]
    assert sorted(first + second) == divide(0.2, 20, contract.seed, "a")[0]
