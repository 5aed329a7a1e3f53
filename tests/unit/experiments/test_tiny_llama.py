from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from mpctf_secure.experiments.tiny_llama import write_tiny_llama

TEXTS = ["my card was stolen at the petrol station", "how do I send money to Spain"] * 20


def test_the_folder_loads_as_model_and_tokenizer(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, TEXTS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == 192_832
    assert len(tokenizer) <= model.config.vocab_size
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_any_text_survives_chatml_and_back(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "Größe 5 €, 日本"}]
    tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(tokens) == "<|im_start|>user\nGröße 5 €, 日本<|im_end|>\n<|im_start|>assistant\n"


def test_the_same_texts_give_the_same_bytes(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "a", TEXTS)
    write_tiny_llama(tmp_path / "b", TEXTS)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
