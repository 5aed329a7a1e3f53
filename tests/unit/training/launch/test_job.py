from mpctf_secure.monitoring.resources import Resources
from mpctf_secure.training.launch.job import _read


def test_sample_of_a_node_with_another_version_is_passed_over() -> None:
    sample = Resources(0.5, 1, 2, 3, 4, 5, 6, ())
    assert _read({"1": sample.to_json().decode(), "2": '{"cpu": 0.5}', "3": "spoilt"}) == {1: sample}
