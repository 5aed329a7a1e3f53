"""LoRA adapters as PEFT folders; numpy only."""

import json
from pathlib import Path

from safetensors.numpy import save_file

from mpctf_secure.aggregation.lora import Schema, Vector, split_flat
from mpctf_secure.config.run import Lora

_STATE_PREFIX = "base_model.model."
_A_SUFFIX = ".lora_A.weight"


def target_modules(schema: Schema) -> list[str]:
    """Full names, in the base model, of the modules that carry LoRA."""
    suffix = len(_A_SUFFIX)
    return [name.removeprefix(_STATE_PREFIX)[:-suffix] for name, _ in schema if name.endswith(_A_SUFFIX)]


def save_adapter_folder(folder: Path, flat: Vector, schema: Schema, lora: Lora, base_name: str) -> None:
    """Writes what `PeftModel.from_pretrained(base, folder)` loads; `base_name` is shown to whoever opens it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(split_flat(flat, schema), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _peft_config(schema, lora, base_name)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
