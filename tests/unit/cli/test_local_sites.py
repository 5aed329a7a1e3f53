from pathlib import Path

import pytest

from mpctf_secure.cli import local_sites
from mpctf_secure.cli.local_sites import Fleet, Material, prepare
from mpctf_secure.config import load
from mpctf_secure.config.run import Model, Participants, RunConfig, Secagg
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.config.strategies import MOST_COUNT
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


def test_local_participants_bear_what_their_own_run_file_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    participants = Participants.model_validate({"local": 2, "data": "builtin:intents"})
    secagg = Secagg(void_rounds=7, allow_pair=True)
    config = RunConfig(participants=participants, model=Model(base="builtin:tiny-llama"), secagg=secagg)
    monkeypatch.setattr(local_sites.children, "spawn", lambda *_, **__: None)
    (tmp_path / "sites" / "site-1").mkdir(parents=True)
    material = Material(model=tmp_path, data={"site-1": tmp_path / "rows.jsonl"}, test=None)
    Fleet(config, tmp_path, b"phrase").start(material, "127.0.0.1:1")
    policy = load.load(tmp_path / "sites" / "site-1" / "site.yaml", SiteConfig).policy
    assert (policy.most_void_rounds, policy.allow_pair, policy.most_passes) == (7, True, MOST_COUNT)
