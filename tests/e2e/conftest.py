import pytest
from e2e.consortium import ROUNDS, THREE, consortium


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter of three rounds in which nothing happens."""
    with consortium(tmp_path_factory.mktemp("undisturbed"), THREE, rounds=ROUNDS) as joint:
        joint.begin()
        joint.end_well()
        assert joint.site_adapters() == {joint.adapter()}
        return joint.adapter()
