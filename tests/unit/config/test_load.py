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
    "a field of another strategy": (RUN + "data: {strategy: percentage, size: 3}", "data.size is not a known", "share"),
    "an unknown strategy": (RUN + "aggregation: {strategy: fedadm}", "strategy is not one of fedavg", "fedadm"),
    "a strategy that is no name": (RUN + "data: {strategy: [1]}", "strategy is not one of fixed_size", "[1]"),
    "a section that is none": (RUN + "data: 3", "strategy is not one of fixed_size", "3"),
    "a value out of range": (
        RUN + "aggregation: {strategy: fedadam, beta1: 2}", "aggregation.beta1: input should be", "2"),
    "a misspelt field": (
        RUN + "aggregation: {strategy: fedprox, muu: 2}", "aggregation.muu is not a known", "mean mu?"),
    "a default outside its bounds": (
        RUN + "training: {batch_size: 64, bounds: {batch_size: [1, 32]}}",
        "batch_size is outside its bounds [1, 32]", "64"),
    "bounds the wrong way round": (
        RUN + "training: {bounds: {local_epochs: [3, 1]}}", "local_epochs is outside its bounds [3, 1]", "bounds"),
    "an unknown nested key": (
        RUN + "training:\n  learning_rat: 0.1\n",
        "line 4: training.learning_rat is not a known field", "learning_rate"),
    "a wrong type": (RUN + "rounds: many\n", "line 3: rounds: ", "'many'"),
    "a number out of range": (RUN + "rounds: 0\n", "rounds: ", "got 0"),
    "a misspelt field that must be there": (
        "participant: [a, b, c]\nmodel: {base: x}\n", "line 1: participant is not a known", "mean participants?"),
    "a missing field": ("model: {base: x}\n", "participants is missing", "configs/"),
    "a key that is there twice": (RUN + "rounds: 1\nrounds: 2\n", "line 4: rounds is there twice", "keep one"),
    "no YAML at all": ("a: [", "not YAML", "indentation"),
    "a list instead of fields": ("- a\n", "not a mapping", "configs/"),
    "an empty file": ("", "not a mapping", "configs/"),
    "a test set where nobody scores": (
        "participants: [a, b, c]\nmodel: {base: x}\nevaluation: {test: t.jsonl}\n",
        "line 3: evaluation: a test set is for local participants", "t.jsonl"),
    "one participant": (RUN.replace("local: 3", "local: 1"), "participants.local", "got 1"),
    "a strategy that does not exist": (
        RUN + "privacy: {strategy: client}\n", "privacy: strategy is not one of none, server_fixed", "client"),
    "noise of nobody knows how much": (
        RUN + "privacy: {strategy: client_fixed}\n", "privacy.noise_multiplier is missing", "configs/"),
    "no noise": (
        RUN + "privacy: {strategy: client_fixed, noise_multiplier: 0}\n", "privacy.noise_multiplier: ", "got 0"),
    "noise that is no number": (
        RUN + "privacy: {strategy: client_fixed, noise_multiplier: .nan}\n", "privacy.noise_multiplier: ", "nan"),
    "a clip norm of nothing": (
        RUN + "privacy: {strategy: none, clip_norm: 0}\n", "privacy.clip_norm: ", "got 0"),
    "a gradient clipped to nothing": (
        RUN + "privacy: {record_dpsgd: {epsilon: 8, clip_norm: 0}}\n", "privacy.record_dpsgd.clip_norm: ", "got 0"),
    "a guarantee that is no number": (
        RUN + "privacy: {record_dpsgd: {epsilon: .nan}}\n", "privacy.record_dpsgd.epsilon: input should be a finite",
        "nan"),
    "a field in the place of a strategy": (
        RUN + "privacy: {strategy: record_dpsgd}\n", "record_dpsgd: {epsilon: 8} stands beside one of them",
        "record_dpsgd"),
    "a clip norm above the largest": (
        RUN + "privacy: {strategy: server_adaptive, noise_multiplier: 1, clip_norm: 9, largest_clip_norm: 2}\n",
        "clip_norm is above largest_clip_norm", "server_adaptive"),
    "the best adapter without rows to choose it by": (
        RUN + "training:\n  send: best\n",
        "line 4: training.send: best needs training.validation above 0", "'best'"),
    "more than half of the rows held out": (
        RUN + "training: {validation: 0.6}\n", "line 3: training.validation: ", "got 0.6"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message", "hint"), BAD.values(), ids=BAD.keys())
def test_mistake_in_a_run_file_is_named(text: str, message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
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
    "GPUs on one of two nodes": (
        "compute: {launcher: ssh, ssh: {known_hosts: k}, nodes: [{address: 10.0.0.1, gpus: [0]}, {address: 10.0.0.2}]}",
        "some nodes name gpus and others do not"),
    "no node": ("compute: {nodes: []}", "nodes is empty"),
    "a variable that is none": ("compute: {nodes: [{environment: {'A B': x}}]}", "compute.nodes.0.environment"),
    "a user that is an option": ("compute: {nodes: [{user: -oProxyCommand=x}]}", "compute.nodes.0.user"),
    "nodes for slurm, which chooses its own": (
        "compute: {launcher: slurm, slurm: {listen: 10.0.0.1}, nodes: [{gpus: [0]}]}", "takes nodes, workers"),
    "a user without ssh": ("compute: {nodes: [{user: me}]}", "are for launcher: ssh"),
    "an interpreter beside the site file": ("compute: {python: venv/bin/python}", "python is an absolute path"),
    "an address with a zone": ("compute: {nodes: [{address: 'fe80::1%$(id)'}]}", "an address with a zone"),
    "a learning rate of zero": ("training: {learning_rate: 0}", "training.learning_rate"),
    "a budget without end": (
        "policy: {budget: {epsilon: .inf, delta: 1.0e-5, unit: record}}",
        "policy.budget.epsilon: input should be a finite number"),
    "a budget that does not say of what": (
        "policy: {budget: {epsilon: 8, delta: 1.0e-5}}", "policy.budget.unit is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_SITES.values(), ids=BAD_SITES.keys())
def test_mistake_in_a_site_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"file\.yaml") as caught:
        read(tmp_path, SITE + text, SiteConfig)
    assert message in caught.value.message
