"""The hash of a base model: what is computed from, not how it is stored. No torch."""

import json
import mmap
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.hazmat.encoding import enc

_LABEL = "mpctf-secure/base-model/v1"
_CONFIG_NOISE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}
_TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja")
_HINT = "name a folder with config.json, model.safetensors and tokenizer.json"


def hash_model(folder: Path) -> bytes:
    """SHA-256 over (name, dtype, shape, bytes) of the sorted tensors, the config without path and version, and the
    tokenizer with its chat template. Sharding does not matter. EnvironmentUnfitError for a folder that is no model.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        total = sha256(enc(_LABEL, _canonical({k: v for k, v in config.items() if k not in _CONFIG_NOISE})))
        total.update(_hash_tokenizer(folder))
        for name, digest in sorted(_tensor_digests(folder)):
            total.update(enc(name, digest))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EnvironmentUnfitError(f"{folder}: not a model folder: {error}", hint=_HINT) from error
    return total.digest()


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _hash_tokenizer(folder: Path) -> bytes:
    texts = [(folder / name).read_bytes() if (folder / name).exists() else b"" for name in _TOKENIZER_FILES]
    settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    return sha256(enc(*texts, str(settings.get("chat_template", "")))).digest()


def _tensor_digests(folder: Path) -> Iterator[tuple[str, bytes]]:
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError("no safetensors file")
    for shard in shards:
        with shard.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            size = int.from_bytes(content[:8], "little")
            header: dict[str, Any] = json.loads(content[8 : 8 + size])
            for name, entry in header.items():
                if name != "__metadata__":
                    yield name, _tensor_digest(content, 8 + size, entry)


def _tensor_digest(content: mmap.mmap, base: int, entry: dict[str, Any]) -> bytes:
    """Straight from the mapped file: a tensor is never copied as a whole."""
    start, end = (base + offset for offset in entry["data_offsets"])
    digest = sha256(enc(entry["dtype"], *entry["shape"]))
    with memoryview(content) as view, view[start:end] as piece:
        digest.update(piece)
    return digest.digest()
