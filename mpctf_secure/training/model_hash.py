"""The hash of a base model: what is computed from, not how it is stored. No torch."""

import json
import mmap
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from mpctf_secure import files
from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.rounds.messages import ModelHashes

_CONFIG_NOISE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}
_TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja")
_HINT = "name a folder with config.json, model.safetensors and tokenizer.json"


def hash_model(folder: Path, cache: Path | None = None) -> ModelHashes:
    """SHA-256 of the config without path and version, of the tokenizer with its chat template, and of (name, dtype,
    shape, bytes) of the sorted tensors, however they are divided among files.

    That of the tensors is taken from `cache`, where it is kept, if their files are the same by name, size, time and
    inode. EnvironmentUnfitError for a folder that is no model.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        plain = {key: value for key, value in config.items() if key not in _CONFIG_NOISE}
        weights = _hash_weights(folder) if cache is None else _cached(folder, cache)
        return ModelHashes(sha256(_canonical(plain)).digest(), _hash_tokenizer(folder), weights)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EnvironmentUnfitError(f"{folder}: not a model folder: {error}", hint=_HINT) from error


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _hash_tokenizer(folder: Path) -> bytes:
    texts = [(folder / name).read_bytes() if (folder / name).exists() else b"" for name in _TOKENIZER_FILES]
    settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    return sha256(enc(*texts, str(settings.get("chat_template", "")))).digest()


def _cached(folder: Path, cache: Path) -> bytes:
    """The file holds a hash of which files the other one is of."""
    states = [(shard, shard.stat()) for shard in _shards(folder)]
    known = (enc(str(path.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in states)
    of = sha256(b"".join(known)).digest()
    if cache.exists() and (kept := cache.read_bytes())[:-32] == of:
        return kept[-32:]
    weights = _hash_weights(folder)
    with files.writing(cache):
        files.replace(cache, of + weights)
    return weights


def _hash_weights(folder: Path) -> bytes:
    return sha256(b"".join(enc(name, digest) for name, digest in sorted(_tensor_digests(folder)))).digest()


def has_chat_template(folder: Path) -> bool:
    """Whether a model folder has one; False too where it is no model folder."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return (folder / "chat_template.jinja").exists() or bool(settings.get("chat_template"))


def _shards(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError("no safetensors file")
    return shards


def _tensor_digests(folder: Path) -> Iterator[tuple[str, bytes]]:
    for shard in _shards(folder):
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
