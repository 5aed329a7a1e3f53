"""What the documents promise is there."""

import re
from pathlib import Path

import yaml

from mpctf_secure.config.run import RunConfig
from mpctf_secure.config.site import SiteConfig

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
    examples = sorted((ROOT / "configs").glob("*.yaml"))
    assert [path.stem for path in examples] == ["demo", "own-data", "run", "site", "smoke"]
    for path in examples:
        model = SiteConfig if path.stem == "site" else RunConfig
        model.model_validate(yaml.safe_load(path.read_text()))


def test_every_claim_of_the_recovery_names_a_test_that_exists() -> None:
    text = (ROOT / "mpctf_secure" / "rounds" / "RECOVERY.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) == 16
    assert all(f"def {name}(" in tests for name in named)
