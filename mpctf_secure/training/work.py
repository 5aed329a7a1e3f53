"""What the head of a training job shares with its other processes, as JSON."""

import json
from typing import NamedTuple

from mpctf_secure.privacy.records import Samples
from mpctf_secure.training.data import Example


class Work(NamedTuple):
    """Of one round: the tensors to train, and the records of each step of DP-SGD, or all of them as one."""

    names: list[str]
    steps: list[list[Example]]
    samples: Samples | None = None

    @property
    def records(self) -> list[Example]:
        """Of all steps."""
        return [example for step in self.steps for example in step]

    def encode(self) -> bytes:
        """Without the samples' secret."""
        steps = [_plain(step) for step in self.steps]
        return json.dumps([self.names, steps, self.samples and self.samples.encode()]).encode()

    @classmethod
    def decode(cls, shared: bytes) -> "Work":
        """What the head has encoded."""
        names, steps, samples = json.loads(shared)
        return cls(names, list(map(_examples, steps)), samples and Samples.decode(samples))


def encode_examples(examples: list[Example]) -> bytes:
    """Those on which every process measures."""
    return json.dumps(_plain(examples)).encode()


def decode_examples(shared: bytes) -> list[Example]:
    """What the head has encoded."""
    return _examples(json.loads(shared))


def _plain(examples: list[Example]) -> list[tuple[int, tuple[int, ...]]]:
    return [(example.answer_start, example.input_ids) for example in examples]


def _examples(plain: list[tuple[int, list[int]]]) -> list[Example]:
    return [Example(tuple(ids), start) for start, ids in plain]
