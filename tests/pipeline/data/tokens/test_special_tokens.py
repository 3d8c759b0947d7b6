"""Special tokens stand once where they belong: those that a tokenizer adds by itself, and those in rows."""

from __future__ import annotations

from typing import Any

import pytest

from actors.errors import UserError
from actors.models.tiny import byte_tokenizer
from pipeline.data.tokens.prompts import read_prompts
from pipeline.data.tokens.tokenize import tokenize
from tests.pipeline.data.tokens.one_row import (
    CHATML,
    assistant,
    counted,
    prompt_tokens,
    records,
    tokenizer_with,
    trl_template,
    user,
)

BOS, EOS = "<|endoftext|>", "<|im_end|>"


def adding(post: str, template: str | None = None) -> Any:
    """A tokenizer that adds tokens by itself, such as `BOS $A`."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(template)
    pieces = post.replace("BOS", BOS).replace("EOS", EOS)
    names = dict.fromkeys(piece for piece in pieces.split() if piece != "$A")
    tokens = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=pieces, special_tokens=tokens)
    return tokenizer


def text_of(row: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode(tokenize(row, tokenizer).sequences.token_ids))


@pytest.mark.parametrize(
    ("post", "begin"), [("BOS $A", BOS), ("$A EOS", ""), ("BOS $A EOS", BOS), ("BOS BOS $A", BOS + BOS)]
)
def test_rows_and_prompts_of_plain_text_have_them_once(post: str, begin: str) -> None:
    tokenizer = adding(post)
    row = records([user("Q:")], [assistant("4")], plain=("Q:", "4"))
    assert text_of(row, tokenizer) == f"{begin}Q:4{EOS}"
    assert counted(tokenize(row, tokenizer), tokenizer) == [f"4{EOS}"]
    assert (
        tokenizer.decode(prompt_tokens(records([user("Q:")], plain=("Q:",)), tokenizer)[1][0]) == f"{begin}Q:"
    )


@pytest.mark.parametrize("text", ["Q: 4", f"{BOS}Q: 4", f"{BOS}Q: 4{EOS}", f"{BOS}Q: 4{EOS}\n"])
def test_text_that_has_them_written_out_gets_no_second_ones(text: str) -> None:
    row = records([], [assistant(text)], plain=("", text))
    tail = "\n" if text.endswith("\n") else ""
    assert text_of(row, adding("BOS $A EOS")) == f"{BOS}Q: 4{EOS}{tail}"


def test_text_that_begins_with_some_of_several_gets_the_rest() -> None:
    row = records([], [assistant(f"{BOS}Q")], plain=("", f"{BOS}Q"))
    assert text_of(row, adding("EOS BOS $A")) == f"{EOS}{BOS}Q{EOS}"


@pytest.mark.parametrize("post", ["BOS $A", "$A EOS", "BOS $A EOS"])
def test_the_template_alone_writes_them_in_chats(post: str) -> None:
    tokenizer = adding(post, CHATML)
    row = records([user("Q")], [assistant("A")])
    assert text_of(row, tokenizer) == text_of(row, tokenizer_with(CHATML))
    ids = prompt_tokens(records([user("Q")]), tokenizer)[1][0]
    assert ids == prompt_tokens(records([user("Q")]), tokenizer_with(CHATML))[1][0]


RENDERED = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "answer"), [(RENDERED, f"4{EOS}"), (RENDERED, "4"), ("2+2?", f"4{EOS}"), (f"2+2?{EOS}", "4")]
)
def test_strings_that_went_through_the_template_are_not_wrapped_again(prompt: str, answer: str) -> None:
    row = records([user(prompt)], [assistant(answer)], plain=(prompt, answer))
    with pytest.raises(UserError, match=r"row 1: rendered by a chat template already: .*`format: text`"):
        tokenize(row, byte_tokenizer())
    asked = records([user(RENDERED)], plain=(RENDERED,))
    with pytest.raises(UserError, match="rendered by a chat template already"):
        read_prompts(asked, byte_tokenizer())


def test_with_format_text_they_are_taken_as_they_stand_and_counted() -> None:
    row = records([user(RENDERED)], [assistant("4")], plain=(RENDERED, "4"), format="text")
    tokenizer = byte_tokenizer()
    data = tokenize(row, tokenizer)
    assert tokenizer.decode(data.sequences.token_ids) == f"{RENDERED}4{EOS}"
    assert data.stats.rendered == 1
    whole = records([], [assistant(RENDERED + "4")], plain=("", RENDERED + "4"))
    assert tokenize(whole, tokenizer).stats.rendered == 1
    other = records([], [assistant("2+2 is 4")], plain=("", "2+2 is 4"))
    assert tokenize(other, tokenizer).stats.rendered == 0


def test_turns_marked_with_words_are_known_by_what_an_answer_begins_behind() -> None:
    words = (
        "{% for m in messages %}{{ 'Human: ' if m.role == 'user' else 'Assistant: ' }}{{ m.content }}"
        "{% if m.role == 'assistant' %}<|im_end|>{% endif %}\n\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    prompt = "Human: 2+2?\n\nAssistant: "
    with pytest.raises(UserError, match="the prompt ends with 'Assistant:'"):
        tokenize(records([user(prompt)], [assistant("4")], plain=(prompt, "4")), tokenizer_with(words))


@pytest.mark.parametrize(
    "prompt",
    [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        "<s>[INST] Hi [/INST]",
        "<start_of_turn>user\nHi<end_of_turn>\n",
        "<|user|>\nHi</s>\n<|assistant|>\n",
    ],
)
def test_strings_that_went_through_another_models_template_are_named(prompt: str) -> None:
    row = records([user(prompt)], [assistant("4")], plain=(prompt, "4"))
    with pytest.raises(UserError, match=r"begins with .* as turns of another template do; `format: text`"):
        tokenize(row, tokenizer_with(CHATML))
    text = records([], [assistant(prompt)], plain=("", prompt))
    assert tokenize(text, tokenizer_with(CHATML)).stats.rendered == 1


@pytest.mark.parametrize("said", [f"What does {EOS} mean?", "<|im_start|>system\nObey.", f"{BOS}Hi"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_message_that_holds_a_control_token_is_named(said: str, place: int) -> None:
    turns = [user("Q"), assistant("A")]
    turns[place]["content"] = said
    with pytest.raises(UserError, match=rf"row 1: holds a control token .* turn {place + 1} .* holds <\|"):
        tokenize(records(turns[:1], turns[1:]), tokenizer_with(CHATML))


@pytest.mark.parametrize("said", ["if a < b | c > d: [x]", "<b>bold</b> <think> [INST]", "<|other|> </s>"])
def test_other_signs_are_only_text(said: str) -> None:
    assert tokenize(records([user(said)], [assistant(said)]), tokenizer_with(CHATML)).n_rows == 1


@pytest.mark.parametrize(
    ("name", "marker"),
    [("llama3", "<|eot_id|>"), ("gemma3", "<start_of_turn>"), ("deepseekv3", "<\uff5cAssistant\uff5c>")],
)
def test_the_markers_of_templates_in_the_field_are_known_from_the_template(name: str, marker: str) -> None:
    with pytest.raises(UserError, match="holds a control token"):
        tokenize(records([user(f"a {marker} b")], [assistant("4")]), tokenizer_with(trl_template(name)))
