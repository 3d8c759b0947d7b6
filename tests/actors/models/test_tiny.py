"""The tiny base: what comes out of its tokenizer, its chat template and its weights."""

from __future__ import annotations

import pytest

from actors.errors import UserError
from actors.models.tiny import (
    BASE_FILES,
    VOCAB_SIZE,
    byte_tokenizer,
    chat_text,
    install_base,
    tiny_config,
    write_tiny_base,
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 3+4?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "And in French?\nPlease."},
    {"role": "assistant", "content": "sept é"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_every_text_comes_back_unchanged(tokenizer):
    text = "".join(map(chr, range(0x300))) + "你好 😀\r\n\ttwo  spaces <|im_start|>user"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_byte_is_its_own_token_id(tokenizer):
    assert tokenizer("9+é")["input_ids"] == [*"9+é".encode()]


def test_all_tokens_fit_the_config(tokenizer):
    config = tiny_config()
    assert len(tokenizer) <= VOCAB_SIZE == config.vocab_size
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (config.eos_token_id, config.pad_token_id)
    assert config.max_position_embeddings >= 2048


def test_chat_text_renders_as_the_template_does(tokenizer):
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == chat_text(CHAT)


def test_the_mask_covers_each_answer_with_its_end_of_turn_token_and_nothing_else(tokenizer):
    out = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "7<|im_end|>sept é<|im_end|>"
    assert marked[-1] == out["input_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("turns", [2, 4])
def test_a_prompt_is_a_prefix_of_the_whole_chat(tokenizer, turns):
    prompt = tokenizer.apply_chat_template(CHAT[:turns], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(CHAT[: turns + 1])["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_the_same_seed_writes_the_same_base_and_disturbs_no_random_state(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = torch.random.get_rng_state()
    first = AutoModelForCausalLM.from_pretrained(write_tiny_base(tmp_path / "a", 3, num_hidden_layers=1))
    second = AutoModelForCausalLM.from_pretrained(write_tiny_base(tmp_path / "b", 3, num_hidden_layers=1))
    other = AutoModelForCausalLM.from_pretrained(write_tiny_base(tmp_path / "c", 4, num_hidden_layers=1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert reloaded.apply_chat_template(CHAT, tokenize=False) == chat_text(CHAT)


def test_installing_takes_the_base_and_leaves_other_files_alone(tmp_path):
    source = write_tiny_base(tmp_path / "run", num_hidden_layers=1)
    (source / "manifest.json").write_text("{}")
    install_base(source, tmp_path / "assets")
    assert {path.name for path in (tmp_path / "assets").iterdir()} == set(BASE_FILES)


def test_an_incomplete_base_is_not_installed(tmp_path):
    source = write_tiny_base(tmp_path / "run", num_hidden_layers=1)
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors missing"):
        install_base(source, tmp_path / "assets")
    assert not (tmp_path / "assets").exists()
