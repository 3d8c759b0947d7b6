"""Records of one row, tokenizers with other templates, and what counts in a row's tokens."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from actors.models.tiny import byte_tokenizer
from pipeline.data.reading.messages import Message
from pipeline.data.reading.records import Record, Records, SourceUse
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.tokenize import TokenizedData, prompt_rows

CHAT: list[Message] = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def records(prompt: list[Message], *answers: list[Message], **record: Any) -> Records:
    """One row; what `Record` holds beside its turns, and `format` and `on_bad_row` of its source."""
    spec = DataSpec(
        source="rows.jsonl",
        format=record.pop("format", "auto"),
        on_bad_row=record.pop("on_bad_row", "error"),
    )
    given = {"plain": None, "columns": {}, "template_kwargs": {}, "file": "rows.jsonl", "row": 1} | record
    row = Record(prompt, answers, source=0, **given)
    kind = {0: "prompt", 1: "sft", 2: "preference"}[len(answers)]
    return Records(kind, [row], [SourceUse(spec, "messages", 1, 1)])  # type: ignore[arg-type]


def prompt_tokens(records: Records, tokenizer: Any) -> tuple[list[str], list[list[int]]]:
    """Texts and token ids of prompts that can all be used."""
    kept, texts, token_ids = prompt_rows(records, tokenizer)
    assert len(kept) == len(records)
    return texts, token_ids


def counted(data: TokenizedData, tokenizer: Any) -> list[str]:
    """The text that counts, for each sequence; ` | ` between pieces."""
    texts = []
    for start, end in zip(data.sequences.offsets[:-1], data.sequences.offsets[1:], strict=True):
        ids, mask = data.sequences.token_ids[start:end], data.sequences.loss_mask[start:end]
        pieces: list[list[int]] = [[]]
        for token, counts in zip(ids, mask, strict=True):
            if counts:
                pieces[-1].append(token)
            elif pieces[-1]:
                pieces.append([])
        texts.append(" | ".join(tokenizer.decode(p) for p in pieces if p))
    return texts


def tokenizer_with(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def trl_template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text()
