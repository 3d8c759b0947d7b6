"""The tiny MoE that comes with Raylign: a byte tokenizer, a chat template and a Qwen3-MoE config.

One definition is used for the embedded base (assets/tiny-moe, trained), the tests (random weights) and the
dry run's fallback tokenizer. Nothing here needs a network.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, TURN_START, TURN_END)
ROLES = ("system", "user", "assistant")
VOCAB_SIZE = 320
"""256 bytes, 3 special tokens, 3 role names, and reserved ids up to a multiple of 64."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML. The newline stands before a turn, not after it: a sequence then ends with the end-of-turn
token, and that token, inside the generation block, is the last one trained."""


def chat_text(messages: Sequence[Mapping[str, str]]) -> str:
    """Render messages as `CHAT_TEMPLATE` does, without a tokenizer."""
    return "\n".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}" for m in messages)


def _bytes_as_characters() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each byte, in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without merges: token id = byte value, then special tokens, then role names.

    Role names are single tokens, which takes 11 of 19 tokens off the frame of a one-turn chat.
    Every text comes back unchanged from encode and decode.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {character: byte for byte, character in enumerate(_bytes_as_characters())}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    core.add_tokens([AddedToken(t, normalized=False) for t in ROLES])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(**overrides: Any) -> Qwen3MoeConfig:
    """A Qwen3-MoE of 1.07 M parameters: 4 layers, hidden 128, 8 experts of which 2 act on a token."""
    from transformers import Qwen3MoeConfig

    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "router_aux_loss_coef": 0.001,
        "bos_token_id": None,
        "eos_token_id": len(_bytes_as_characters()) + SPECIAL_TOKENS.index(TURN_END),
        "pad_token_id": len(_bytes_as_characters()) + SPECIAL_TOKENS.index(PAD),
    }
    return Qwen3MoeConfig(**{**settings, **overrides})


def write_tiny_base(path: str | Path, seed: int = 0, **overrides: Any) -> Path:
    """Write config, tokenizer and random float32 weights (from `seed`) as a loadable base.

    `overrides` go to `tiny_config`, e.g. `num_hidden_layers=2`. The global random state is left alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(**overrides), dtype=torch.float32)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


BASE_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""Files of the embedded base; others in a run's directory are not copied."""


def install_base(source: str | Path, target: str | Path) -> None:
    """Copy a trained tiny base to where the recipes look for it. Nothing is touched if a file is missing."""
    source, target = Path(source), Path(target)
    missing = [name for name in BASE_FILES if not (source / name).is_file()]
    if missing:
        raise UserError(f"{source} is not a complete base: {', '.join(missing)} missing")
    target.mkdir(parents=True, exist_ok=True)
    for name in BASE_FILES:
        shutil.copyfile(source / name, target / name)


if __name__ == "__main__":
    install_base(*sys.argv[1:])
