from pathlib import Path

import pytest

from mpctf_secure.cli.local_sites import prepare
from mpctf_secure.config.run import Model, Participants, RunConfig
from mpctf_secure.training.rows import load_rows

FILES = {
    "rows.jsonl": '{"prompt": "a", "completion": "b"}\n\n{"text": "c\u2028d"}\n{"instruction": "e", "output": "f"}\n',
    "rows.json": '[{"prompt": "a", "completion": "b"},\n{"text": "c\u2028d"}, {"instruction": "e", "output": "f"}]',
    "rows.csv": 'prompt,completion,text,instruction,output\na,b,,,\n,,"c\u2028d",,\n,,,e,f\n',
}


@pytest.mark.parametrize("split", ["iid", "label"])
@pytest.mark.parametrize("name", FILES)
def test_one_file_of_any_format_is_divided(tmp_path: Path, name: str, split: str) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    participants = Participants.model_validate({"local": 2, "data": name, "split": split})
    config = RunConfig(participants=participants, model=Model(base="builtin:tiny-llama"))
    material = prepare(config, tmp_path / "run", tmp_path)
    divided = [row.messages for path in material.data.values() for row in load_rows(path)]
    assert sorted(divided) == sorted(row.messages for row in load_rows(tmp_path / name))
