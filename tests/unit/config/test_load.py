from pathlib import Path

import pytest

from mpctf_secure.config import load
from mpctf_secure.config.run import RunConfig
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.config.strategies import FedAdam, FedAvg, FedYogi, FixedSize, Percentage
from mpctf_secure.errors import UsageError

RUN = "participants: {local: 3, data: 'builtin:intents'}\nmodel: {base: x}\n"
SITE = "coordinator: 192.0.2.1:8443\nmodel: m\ndata: d.jsonl\n"


def read(folder: Path, text: str, model: type = RunConfig) -> object:
    (folder / "file.yaml").write_text(text)
    return load.load(folder / "file.yaml", model)


GOOD = {
    "nothing said": ("", FixedSize(), FedAvg()),
    "a field without its strategy": ("data: {size: 3}", FixedSize(size=3), FedAvg()),
    "percentage": ("data: {strategy: percentage, share: 0.2}", Percentage(share=0.2), FedAvg()),
    "fedadam": ("aggregation: {strategy: fedadam, tau: 0.1}", FixedSize(), FedAdam(tau=0.1)),
    "fedyogi": ("aggregation: {strategy: fedyogi, lora: freeze_a}", FixedSize(), FedYogi(lora="freeze_a")),
}


@pytest.mark.parametrize(("text", "data", "aggregation"), GOOD.values(), ids=GOOD.keys())
def test_strategies_are_chosen_by_name(text: str, data: object, aggregation: object, tmp_path: Path) -> None:
    config = read(tmp_path, RUN + text)
    assert (config.data, config.aggregation) == (data, aggregation)


BAD = {
    "a field of another strategy": ("data: {strategy: percentage, size: 3}", "data.size is not a known", "share"),
    "an unknown strategy": ("aggregation: {strategy: fedadm}", "strategy is none of fedavg, fedprox", "fedadm"),
    "a strategy that is no name": ("data: {strategy: [1]}", "strategy is none of fixed_size", "[1]"),
    "a section that is none": ("data: 3", "strategy is none of fixed_size", "3"),
    "a value out of range": ("aggregation: {strategy: fedadam, beta1: 2}", "aggregation.beta1: input should be", "2"),
    "a misspelt field": ("aggregation: {strategy: fedprox, muu: 2}", "aggregation.muu is not a known", "mean mu?"),
    "a default outside its bounds": (
        "training: {batch_size: 64, bounds: {batch_size: [1, 32]}}", "batch_size is outside its bounds [1, 32]", "64"),
    "bounds the wrong way round": (
        "training: {bounds: {local_epochs: [3, 1]}}", "local_epochs is outside its bounds [3, 1]", "bounds"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message", "hint"), BAD.values(), ids=BAD.keys())
def test_mistake_in_a_run_file_is_named(text: str, message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, RUN + text)
    assert message in caught.value.message
    assert hint in caught.value.hint


BAD_SITES = {
    "a host name": ("compute: {nodes: [{address: gpu-1}]}", "compute.nodes.0.address"),
    "two nodes for the local launcher": (
        "compute: {nodes: [{address: 10.0.0.1}, {address: 10.0.0.2}]}", "several nodes need launcher"),
    "ssh without its section": ("compute: {launcher: ssh}", "launcher: ssh and the section ssh go together"),
    "a section of another launcher": ("compute: {ssh: {known_hosts: k}}", "go together"),
    "GPUs and processes": ("compute: {nodes: [{gpus: [0], processes: 2}]}", "every GPU has one process"),
    "a GPU twice": ("compute: {nodes: [{gpus: [1, 1]}]}", "a GPU is named twice"),
    "no node": ("compute: {nodes: []}", "nodes is empty"),
    "a variable that is none": ("compute: {nodes: [{environment: {'A B': x}}]}", "compute.nodes.0.environment"),
    "a user that is an option": ("compute: {nodes: [{user: -oProxyCommand=x}]}", "compute.nodes.0.user"),
    "a learning rate of zero": ("training: {learning_rate: 0}", "training.learning_rate"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_SITES.values(), ids=BAD_SITES.keys())
def test_mistake_in_a_site_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"file\.yaml") as caught:
        read(tmp_path, SITE + text, SiteConfig)
    assert message in caught.value.message
