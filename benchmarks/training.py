"""Training: tokens a second and peak memory of the program's loop, and of TRL's SFTTrainer on the very same batches.

Usage: python benchmarks/training.py [--model FOLDER] [--batches N]

Both train the same adapter on the same base, in the same dtype, on the same rows in the same order, so that both pad
alike; only answers have a loss. TRL runs in its best configuration: no checkpoints, logs, clipping or activation
checkpointing, fused AdamW; on a CPU with transformers' loss and eager attention, for TRL's own loss scores prompts too
where there is no Triton. Its seconds are those that it reports itself, without what it sets up before the first step;
ours are those of the whole call. Passes take turns in one process, and a figure is their median. Memory is measured in
a process for each side: above what the imports took, or on a GPU what torch allocated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
import transformers
import trl
from peft import LoraConfig, PeftModel
from secagg import machine, memory

from mpctf_secure.aggregation.lora import flat_size
from mpctf_secure.cli.models import cache
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute
from mpctf_secure.experiments.intents import write_intents
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.training.data import Example, tokenise
from mpctf_secure.training.device import hardware
from mpctf_secure.training.loop import Recipe, train_steps
from mpctf_secure.training.model import (
    adapter_schema,
    base_dtype,
    load_adapter_model,
    load_base,
    load_tokenizer,
    pad_id,
    read_adapter,
    write_adapter,
)
from mpctf_secure.training.rows import load_rows

DEMO = cache() / "models" / "smollm2-135m-instruct"
LORA, LEARNING_RATE = Lora(), 1e-3
PASSES = 5
CUDA = torch.cuda.is_available()
SAME_LOSS, SAME_WAY = (1e-2, 0.3) if base_dtype() == torch.bfloat16 else (1e-5, 0.01)


class Shape(NamedTuple):
    """A batch's rows, and how many demo messages make a row: one and its label, or half asked and half answered."""

    batch_size: int
    messages: int


SHAPES = {"short": Shape(16, 1), "long": Shape(8, 6)}


class Pass(NamedTuple):
    """Once over the rows: mean loss of the steps, and seconds."""

    loss: float
    seconds: float


class Side(NamedTuple):
    """A loaded model, and what trains its adapter on rows."""

    model: PeftModel
    train: Callable[[Sequence[Example]], Pass]


def examples(model: Path, shape: Shape, batches: int) -> list[Example]:
    """The shortest first, so that no side has to sort."""
    with tempfile.TemporaryDirectory() as folder:
        write_intents(Path(folder), ["rows", "others"], batches * shape.batch_size * shape.messages, 1, seed=0)
        path = Path(folder, "rows.jsonl")
        if shape.messages > 1:
            path.write_text("\n".join(joined(path.read_text().splitlines(), shape.messages)))
        found, _ = tokenise(load_rows(path), load_tokenizer(model), max_length=512)
    return sorted(found, key=lambda example: len(example.input_ids))


def joined(lines: list[str], messages: int) -> list[str]:
    """Rows with half of so many messages as prompt and the others as answer."""
    texts = [json.loads(line)["messages"][1]["content"] for line in lines]
    groups = [texts[first : first + messages] for first in range(0, len(texts), messages)]
    half = messages // 2
    return [json.dumps({"prompt": " ".join(group[:half]), "completion": " ".join(group[half:])}) for group in groups]


def our_side(folder: Path, batch_size: int) -> Side:
    """As the training job does it."""
    model, pad = load_adapter_model(folder, LORA, Compute()), pad_id(load_tokenizer(folder))

    def train(rows: Sequence[Example]) -> Pass:
        started = clock()
        result = train_steps(model, rows, Recipe(batch_size, 1, LEARNING_RATE, pad))
        return Pass(result.loss, clock() - started)

    return Side(model, train)


def clock() -> float:
    """Seconds, when all that was asked of the device is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


class PlainLossTrainer(trl.SFTTrainer):
    """With the loss of transformers' Trainer, which computes all logits at once."""

    compute_loss = transformers.Trainer.compute_loss


def trl_side(folder: Path, batch_size: int) -> Side:
    """As TRL's documentation does it, but for what makes it slower."""
    base = load_base(folder, base_dtype())
    base.set_attn_implementation("sdpa" if CUDA else "eager")
    trainer = (trl.SFTTrainer if CUDA else PlainLossTrainer)(
        base,
        trl_config(batch_size),
        train_dataset=dataset([Example((0, 0), 1)]),
        processing_class=load_tokenizer(folder),
        peft_config=LoraConfig(
            r=LORA.r, lora_alpha=LORA.alpha, target_modules=LORA.target_modules, task_type="CAUSAL_LM"
        ),
    )
    trainer.remove_callback(transformers.PrinterCallback)

    def train(rows: Sequence[Example]) -> Pass:
        trainer.optimizer, trainer.train_dataset = None, dataset(rows)
        result = trainer.train()
        return Pass(result.training_loss, result.metrics["train_runtime"])

    return Side(trainer.model, train)


def trl_config(batch_size: int) -> trl.SFTConfig:
    """What the program's loop does, and nothing besides."""
    return trl.SFTConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        optim="adamw_torch_fused",
        bf16=base_dtype() == torch.bfloat16,
        use_cpu=not CUDA,
        activation_checkpointing=False,
        packing=False,
        max_length=None,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=CUDA,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def dataset(rows: Sequence[Example]) -> datasets.Dataset:
    """Rows with the labels that TRL makes of prompt and completion under `completion_only_loss`."""
    return datasets.Dataset.from_list(
        [
            {"input_ids": row.input_ids, "labels": (-100,) * row.answer_start + row.input_ids[row.answer_start :]}
            for row in rows
        ]
    )


SIDES: dict[str, Callable[[Path, int], Side]] = {"ours": our_side, "TRL": trl_side}


def rates(folder: Path, shape: Shape, rows: Sequence[Example]) -> dict[str, float]:
    """Tokens a second of each side, once it is sure that they compute the same."""
    sides = {name: load(folder, shape.batch_size) for name, load in SIDES.items()}
    assert len({side.model.num_parameters(only_trainable=True) for side in sides.values()}) == 1
    agree(*sides.values(), rows[: shape.batch_size])
    agree(*sides.values(), rows)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(PASSES):
        for name, side in sides.items():
            seconds[name].append(side.train(rows).seconds)
    tokens = sum(len(row.input_ids) for row in rows)
    return {name: tokens / statistics.median(found) for name, found in seconds.items()}


def agree(ours: Side, theirs: Side, rows: Sequence[Example]) -> None:
    """From one adapter, same loss and same way moved; Adam makes a whole step of a gradient that is but rounding."""
    start = (np.sin(np.arange(flat_size(adapter_schema(ours.model)))) / 10).astype(np.float32)
    losses, ways = [], []
    for side in (ours, theirs):
        write_adapter(side.model, start)
        losses.append(side.train(rows).loss)
        ways.append(read_adapter(side.model) - start)
    np.testing.assert_allclose(losses[0], losses[1], rtol=SAME_LOSS)
    apart = np.linalg.norm(ways[0] - ways[1]) / np.linalg.norm(ways[1])
    assert apart < SAME_WAY, apart


def measure(folder: Path, shape: Shape, side: str, batches: int) -> float:
    """Bytes in this process while the side trains once."""
    SIDES[side](folder, shape.batch_size).train(examples(folder, shape, batches))
    return torch.cuda.max_memory_allocated() if CUDA else memory("VmHWM") - BASELINE


def measure_in_child(folder: Path, shape: str, side: str, batches: int) -> float:
    """The same in a fresh process."""
    argv = [sys.executable, __file__, "--model", str(folder), "--batches", str(batches), "--measure", side, shape]
    return json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout)


def compare(folder: Path, batches: int) -> bool:
    """Print a line for each shape; whether ours is at least as good in all."""
    # Before this process holds memory on the GPU.
    peaks = {shape: {side: measure_in_child(folder, shape, side, batches) / 1e6 for side in SIDES} for shape in SHAPES}
    print("| rows | tokens/s | TRL | × | MB | TRL | × | must be ≥ 1 |\n|---|---|---|---|---|---|---|---|")
    reached = True
    for name, shape in SHAPES.items():
        rows = examples(folder, shape, batches)
        rate, peak = rates(folder, shape, rows), peaks[name]
        faster, leaner = rate["ours"] / rate["TRL"], peak["TRL"] / peak["ours"]
        good = min(faster, leaner) >= 1
        reached &= good
        cells = (
            f"{shape.batch_size} of {statistics.mean(len(row.input_ids) for row in rows):.0f} tokens",
            f"{rate['ours']:.0f}", f"{rate['TRL']:.0f}", f"{faster:.2f}",
            f"{peak['ours']:.0f}", f"{peak['TRL']:.0f}", f"{leaner:.2f}",
            "reached" if good else "MISSED",
        )  # fmt: skip
        print("|", " | ".join(cells), "|", flush=True)
    return reached


def model_folder(given: Path | None, beside: Path) -> Path:
    """The given one, else the demo model if it is there, else a tiny Llama of its own."""
    if given or (DEMO / "config.json").exists():
        return given or DEMO
    write_intents(beside, ["rows", "others"], 200, 1, seed=0)
    write_tiny_llama(beside / "tiny-llama", (beside / "rows.jsonl").read_text().splitlines())
    return beside / "tiny-llama"


def quiet() -> None:
    """Figures only."""
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> int:
    """Parse, measure, print; 1 if TRL is faster or needs less memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a transformers folder; else the demo model, or a tiny Llama")
    parser.add_argument("--batches", type=int, default=4, help="in a pass")
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "SHAPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.measure:
        side, shape = options.measure
        print(json.dumps(measure(options.model, SHAPES[shape], side, options.batches)))
        return 0
    with tempfile.TemporaryDirectory() as work:
        folder = model_folder(options.model, Path(work))
        print(f"{machine()}; {', '.join(f'{name} {value}' for name, value in hardware().items())}")
        print(f"TRL {trl.__version__}; {folder.name} in {base_dtype()}\n")
        return 0 if compare(folder, options.batches) else 1


BASELINE = memory("VmRSS")

if __name__ == "__main__":
    sys.exit(main())
