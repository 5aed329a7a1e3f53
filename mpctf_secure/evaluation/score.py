"""Held-out accuracy of several variants of one base model, in a process of its own.

Usage: python -m mpctf_secure.evaluation.score REQUEST.json; a line of JSON for each variant goes to RESULTS.jsonl
beside the request.
"""

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from peft import PeftModel
from pydantic import Field
from safetensors.numpy import load_file

from mpctf_secure.aggregation.lora import Vector, initial_adapter, join_flat
from mpctf_secure.config.base import Frozen
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute
from mpctf_secure.config.training import Training
from mpctf_secure.errors import MpctfError
from mpctf_secure.evaluation.metrics import exact_match
from mpctf_secure.training.children import die_with_parent
from mpctf_secure.training.data import ChatTokenizer, Example, tokenise
from mpctf_secure.training.loop import Recipe, train_steps
from mpctf_secure.training.model import adapter_schema, load_adapter_model, load_tokenizer, pad_id, write_adapter
from mpctf_secure.training.rows import load_rows

RESULTS = "results.jsonl"
_BATCH = 16


class Slices(Frozen):
    """One data file and, round by round, the rows of it to train on."""

    data: Path
    rounds: tuple[tuple[int, ...], ...]


class Variant(Frozen):
    """The base with the adapter in a folder, or trained here from adapter 0 on all the slices, or neither."""

    name: str
    adapter: Path | None = None
    train: tuple[Slices, ...] = ()


class Request(Frozen):
    """What to score, and on which rows."""

    model: Path
    test: Path
    lora: Lora
    training: Training
    seed: int
    variants: tuple[Variant, ...] = Field(min_length=1)


class Scorer:
    """The base model, loaded once for all variants."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._tokenizer: ChatTokenizer = load_tokenizer(request.model)
        self._model: PeftModel = load_adapter_model(request.model, request.lora, Compute())
        self._schema = adapter_schema(self._model)
        self._test = self._examples(request.test)

    def score(self, variant: Variant) -> dict[str, object]:
        """The variant's accuracy on the test rows: exact match of the greedy answer."""
        write_adapter(self._model, self._start(variant))
        training = self._request.training
        recipe = Recipe(training.batch_size, training.local_epochs, training.learning_rate, pad_id(self._tokenizer))
        for examples in self._rounds(variant.train):
            train_steps(self._model, examples, recipe)
        accuracy = exact_match(self._model, self._test, _BATCH, pad_id(self._tokenizer))
        return {"name": variant.name, "accuracy": accuracy}

    def _start(self, variant: Variant) -> Vector:
        if variant.adapter is None:
            return initial_adapter(self._schema, self._request.seed)
        return join_flat(load_file(variant.adapter / "adapter_model.safetensors"), self._schema)

    def _rounds(self, parts: Sequence[Slices]) -> Iterator[list[Example]]:
        """Round by round the rows of all parts in turn, so that a batch mixes them."""
        loaded = [(self._examples(part.data), part.rounds) for part in parts]
        for number in range(len(parts[0].rounds) if parts else 0):
            slices = [[examples[index] for index in rounds[number]] for examples, rounds in loaded]
            yield [example for turn in itertools.zip_longest(*slices) for example in turn if example is not None]

    def _examples(self, path: Path) -> list[Example]:
        return tokenise(load_rows(path), self._tokenizer, self._request.training.max_length)[0]


def main(path: Path) -> None:
    """Score every variant of the request."""
    die_with_parent()
    request = Request.model_validate_json(path.read_bytes())
    scorer = Scorer(request)
    with (path.parent / RESULTS).open("w", encoding="utf-8") as results:
        for variant in request.variants:
            results.write(json.dumps(scorer.score(variant)) + "\n")
            results.flush()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except MpctfError as failure:
        print(f"error: {failure.message}\nhint: {failure.hint}")
        sys.exit(failure.exit_code)
