"""A Llama of 190 thousand random weights with its own BPE tokenizer, for tests that need a real folder and no time."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mpctf_secure.hazmat.prg import SEED_BYTES, Generator

_HIDDEN, _LAYERS, _HEADS, _KV_HEADS, _INTERMEDIATE, _VOCABULARY = 64, 2, 4, 2, 352, 512
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_PAD, _START, _END = _SPECIAL
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_llama(folder: Path, texts: Iterable[str]) -> None:
    """Writes a transformers model folder (float32); the tokenizer is trained on `texts`, the weights are fixed."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(texts)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    _write_json(folder / "config.json", _config())
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})


def _train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": _PAD,
        "chat_template": _CHATML,
        "model_max_length": 512,
    }


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": _VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "pad_token_id": _SPECIAL.index(_PAD),
        "bos_token_id": _SPECIAL.index(_START),
        "eos_token_id": _SPECIAL.index(_END),
    }


def _shapes() -> dict[str, tuple[int, ...]]:
    kv_width = _HIDDEN * _KV_HEADS // _HEADS
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (_VOCABULARY, _HIDDEN), "norm": (_HIDDEN,)}
    for layer in range(_LAYERS):
        shapes |= {
            f"layers.{layer}.input_layernorm": (_HIDDEN,),
            f"layers.{layer}.self_attn.q_proj": (_HIDDEN, _HIDDEN),
            f"layers.{layer}.self_attn.k_proj": (kv_width, _HIDDEN),
            f"layers.{layer}.self_attn.v_proj": (kv_width, _HIDDEN),
            f"layers.{layer}.self_attn.o_proj": (_HIDDEN, _HIDDEN),
            f"layers.{layer}.post_attention_layernorm": (_HIDDEN,),
            f"layers.{layer}.mlp.gate_proj": (_INTERMEDIATE, _HIDDEN),
            f"layers.{layer}.mlp.up_proj": (_INTERMEDIATE, _HIDDEN),
            f"layers.{layer}.mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
        }
    return shapes


def _weights() -> dict[str, npt.NDArray[np.float32]]:
    generator = Generator(bytes(SEED_BYTES))
    return {f"model.{name}.weight": _initial(shape, generator) for name, shape in _shapes().items()}


def _initial(shape: tuple[int, ...], generator: Generator) -> npt.NDArray[np.float32]:
    """Norms are ones; matrices are uniform with variance 1 / fan-in."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    limit = math.sqrt(3 / shape[-1])
    uniform = generator.uint32(int(np.prod(shape))) / 2**32
    return (limit * (2 * uniform - 1)).astype(np.float32).reshape(shape)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
