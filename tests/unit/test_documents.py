"""What the documents promise is there."""

import re
from pathlib import Path
from typing import get_args

import yaml

from mpctf_secure.config.run import RunConfig
from mpctf_secure.config.site import Compute, SiteConfig
from mpctf_secure.config.strategies import Aggregation, Data

ROOT = Path(__file__).parents[2]


def test_every_claim_of_the_threat_model_names_a_test_that_exists() -> None:
    claims = re.findall(r"`([a-z0-9_/]+\.py)::(\w+)`", (ROOT / "threat-model.md").read_text())
    assert len(claims) > 10
    missing = [
        (file, name)
        for file, name in claims
        if f"def {name}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8")
    ]
    assert missing == []


def test_every_example_config_is_valid() -> None:
    examples = sorted((ROOT / "configs").rglob("*.yaml"))
    assert [path.stem for path in examples if path.parent.name == "configs"] == [
        "demo",
        "own-data",
        "run",
        "site",
        "smoke",
    ]
    for path in examples:
        is_site = path.stem == "site" or path.parent.name == "sites"
        (SiteConfig if is_site else RunConfig).model_validate(yaml.safe_load(path.read_text()))


def test_every_launcher_and_strategy_has_an_example_that_names_all_its_fields() -> None:
    sites = {path.stem for path in (ROOT / "configs" / "sites").glob("*.yaml")}
    assert sites == set(get_args(Compute.model_fields["launcher"].annotation))
    found = {}
    for path in (ROOT / "configs" / "strategies").glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        found.update({part["strategy"]: set(part) for part in map(content.get, ("data", "aggregation")) if part})
    models = [get_args(member)[0] for union in (Data, Aggregation) for member in get_args(get_args(union)[0])]
    assert set(found) == {model.model_fields["strategy"].default for model in models}
    for model in models:
        fields = set(model.model_fields) - {"lora"}
        assert fields <= found[model.model_fields["strategy"].default]


def test_every_claim_of_the_recovery_names_a_test_that_exists() -> None:
    text = (ROOT / "mpctf_secure" / "rounds" / "RECOVERY.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) == 16
    assert all(f"def {name}(" in tests for name in named)
