"""LoRA adapters as PEFT folders; numpy only."""

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import save_file

from mpctf_secure import files
from mpctf_secure.aggregation.lora import A_SUFFIX, Schema, Vector, split_flat
from mpctf_secure.config.run import Lora
from mpctf_secure.errors import EnvironmentUnfitError

WEIGHTS = "adapter_model.safetensors"
_STATE_PREFIX = "base_model.model."


def target_modules(schema: Schema) -> list[str]:
    """Full names, in the base model, of the modules that carry LoRA."""
    suffix = len(A_SUFFIX)
    return [name.removeprefix(_STATE_PREFIX)[:-suffix] for name, _ in schema if name.endswith(A_SUFFIX)]


def save_adapter_folder(folder: Path, flat: Vector, schema: Schema, lora: Lora, base_name: str) -> bytes:
    """Writes what `PeftModel.from_pretrained(base, folder)` loads; `base_name` is shown to whoever opens it.

    On disk, as a whole, when this returns; a folder of an earlier try is replaced. SHA-256 of the file of weights.
    """
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with files.writing(unfinished):
        try:
            save_file(split_flat(flat, schema), unfinished / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise EnvironmentUnfitError(f"{unfinished}: {error}", hint="has the disk room?") from error
        config = _peft_config(schema, lora, base_name)
        (unfinished / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            files.sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        files.sync(folder.parent)
    return files.digest(folder / WEIGHTS)


def _peft_config(schema: Schema, lora: Lora, base_name: str) -> dict[str, object]:
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": lora.r,
        "target_modules": target_modules(schema),
        "task_type": "CAUSAL_LM",
    }
