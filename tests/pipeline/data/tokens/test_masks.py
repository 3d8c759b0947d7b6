"""Loss masks: the assistant's words and its end-of-turn token are trained, nothing else."""

from __future__ import annotations

import pytest

from actors.errors import UserError
from actors.models.tiny import byte_tokenizer
from pipeline.data.tokens.tokenize import tokenize
from tests.pipeline.data.tokens.one_row import (
    CHAT,
    CHATML,
    counted,
    prompt_tokens,
    records,
    tokenizer_with,
    trl_template,
)


def test_every_answer_of_a_conversation_counts_with_its_end_of_turn() -> None:
    tokenizer = byte_tokenizer()
    data = tokenize(records([], CHAT), tokenizer)
    assert counted(data, tokenizer) == ["A1<|im_end|> | A2<|im_end|>"]
    assert data.stats.masking == "template marks"


def test_after_a_prompt_only_the_completion_counts() -> None:
    tokenizer = byte_tokenizer()
    assert counted(tokenize(records(CHAT[:3], CHAT[3:]), tokenizer), tokenizer) == ["A2<|im_end|>"]


@pytest.mark.parametrize("template", [None, CHATML])
def test_of_a_completion_of_several_turns_only_the_assistant_counts(template: str | None) -> None:
    tokenizer = tokenizer_with(template) if template else byte_tokenizer()
    longer = [*CHAT[1:], {"role": "user", "content": "Q3"}, {"role": "assistant", "content": "A3"}]
    (text,) = counted(tokenize(records(CHAT[:1], longer), tokenizer), tokenizer)
    assert [piece.strip() for piece in text.split(" | ")] == ["A1<|im_end|>", "A2<|im_end|>", "A3<|im_end|>"]
    (text,) = counted(tokenize(records(CHAT[:3], longer[2:]), tokenizer), tokenizer)
    assert [piece.strip() for piece in text.split(" | ")] == ["A2<|im_end|>", "A3<|im_end|>"]


def test_chosen_and_rejected_count_after_the_same_prompt() -> None:
    tokenizer = byte_tokenizer()
    data = tokenize(records(CHAT[:1], [CHAT[1]], [CHAT[3]]), tokenizer)
    assert counted(data, tokenizer) == ["A1<|im_end|>", "A2<|im_end|>"]
    assert (data.n_rows, data.sequences.n_sequences, data.batch([0]).sequences_per_row) == (1, 2, 2)


def test_everything_counts_on_request_except_the_first_token_which_has_no_predictor() -> None:
    data = tokenize(records(CHAT[:1], CHAT[1:2]), byte_tokenizer(), train_on="all")
    assert data.sequences.loss_mask.tolist() == [False] + [True] * (data.stats.tokens - 1)


def test_a_template_without_marks_is_masked_by_prefixes() -> None:
    tokenizer = tokenizer_with(CHATML)
    data = tokenize(records([], CHAT), tokenizer)
    assert counted(data, tokenizer) == ["A1<|im_end|>\n | A2<|im_end|>\n"]
    assert data.stats.masking == "prefixes"


def test_an_end_of_turn_outside_the_marks_is_trained_all_the_same() -> None:
    template = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>",
    )
    tokenizer = tokenizer_with(template)
    assert counted(tokenize(records([], CHAT), tokenizer), tokenizer) == ["A1<|im_end|> | A2<|im_end|>"]


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen2_5", "qwen3_instruct_2507", "lfm2_2_5"])
def test_templates_in_the_field_count_both_answers_and_no_question(name: str) -> None:
    tokenizer = tokenizer_with(trl_template(name))
    (text,) = counted(tokenize(records([], CHAT), tokenizer), tokenizer)
    first, second = text.split(" | ")
    assert first.startswith("A1<")
    assert second.startswith("A2<")
    assert first[2:].strip() == second[2:].strip()


def test_a_template_that_rewrites_earlier_turns_is_replaced_by_trls_training_template() -> None:
    tokenizer = tokenizer_with(trl_template("qwen3"))
    data = tokenize(records([], CHAT), tokenizer)
    assert data.stats.masking == "template marks of TRL's training template"
    (text,) = counted(data, tokenizer)
    assert [p.split("</think>\n\n")[-1].strip() for p in text.split(" | ")] == [
        "A1<|im_end|>",
        "A2<|im_end|>",
    ]


def test_an_unknown_template_that_rewrites_earlier_turns_is_refused_with_what_to_do() -> None:
    counting = "{{ messages | length }} turns\n" + CHATML
    with pytest.raises(UserError, match=r"put \{% generation %\} and \{% endgeneration %\} around"):
        tokenize(records([], CHAT), tokenizer_with(counting))


def test_a_template_without_end_of_turn_is_refused() -> None:
    with pytest.raises(UserError, match="writes no end-of-turn token"):
        tokenize(
            records(CHAT[:1], CHAT[1:2]), tokenizer_with("{% for m in messages %}{{ m.content }}{% endfor %}")
        )


def test_a_template_that_drops_plain_strings_is_refused() -> None:
    with pytest.raises(UserError, match="leaves out an answer that is a plain string"):
        tokenize(records([], CHAT), tokenizer_with(trl_template("idefics3")))


def test_a_row_that_the_template_refuses_is_a_bad_row() -> None:
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        + CHATML
    )
    with pytest.raises(
        UserError, match=r"rows\.jsonl row 1: refused by the chat template: no system role here"
    ):
        tokenize(records([], [{"role": "system", "content": "S"}, *CHAT]), tokenizer_with(strict))


def test_messages_on_a_base_without_template_are_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"the base has none: use the instruct version.*chat_template\.jinja"):
        tokenize(records([], CHAT), tokenizer_with(None))


def test_strings_on_a_base_without_template_are_joined_and_ended() -> None:
    tokenizer = tokenizer_with(None)
    data = tokenize(records(CHAT[:1], CHAT[1:2], plain=("Q1 ", "A1")), tokenizer)
    assert tokenizer.decode(data.sequences.token_ids) == "Q1 A1<|im_end|>"
    assert counted(data, tokenizer) == ["A1<|im_end|>"]
    assert data.stats.formats == {"text": 1}


def test_strings_go_through_the_template_where_there_is_one_unless_told_otherwise() -> None:
    tokenizer = byte_tokenizer()
    chat = tokenize(records(CHAT[:1], CHAT[1:2], plain=("Q1 ", "A1")), tokenizer)
    text = tokenize(records(CHAT[:1], CHAT[1:2], plain=("Q1 ", "A1"), format="text"), tokenizer)
    assert (chat.stats.formats, text.stats.formats) == ({"chat": 1}, {"text": 1})
    assert tokenizer.decode(chat.sequences.token_ids).startswith("<|im_start|>user\nQ1<|im_end|>")


def test_plain_text_counts_from_its_second_token_to_its_end() -> None:
    tokenizer = byte_tokenizer()
    data = tokenize(records([], [{"role": "assistant", "content": "abc"}], plain=("", "abc")), tokenizer)
    assert counted(data, tokenizer) == ["bc<|im_end|>"]


def test_a_prompt_ends_where_the_answer_begins() -> None:
    tokenizer = byte_tokenizer()
    (text,), (ids,) = prompt_tokens(records(CHAT[:3]), tokenizer)
    whole = tokenize(records(CHAT[:3], CHAT[3:]), tokenizer).sequences
    assert text.endswith("<|im_start|>assistant\n")
    assert ids == whole.token_ids[~whole.loss_mask].tolist()


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_turn_that_its_row_leaves_out_of_the_loss_does_not_count(template: str | None) -> None:
    tokenizer = tokenizer_with(template) if template else byte_tokenizer()
    (text,) = counted(tokenize(records([], CHAT, untrained=frozenset({1})), tokenizer), tokenizer)
    assert text.strip() == "A2<|im_end|>"
    (text,) = counted(tokenize(records([], CHAT, untrained=frozenset({3})), tokenizer), tokenizer)
    assert text.strip() == "A1<|im_end|>"


def test_a_turn_left_out_is_known_where_a_template_marks_a_turn_in_pieces() -> None:
    pieces = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content[:1] }}{% endgeneration %}"
        "{% generation %}{{ m.content[1:] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    tokenizer = tokenizer_with(pieces)
    for untrained, left in ((1, "A2<|im_end|>"), (3, "A1<|im_end|>")):
        data = tokenize(records([], CHAT, untrained=frozenset({untrained})), tokenizer)
        assert counted(data, tokenizer) == [left]


def test_where_everything_counts_a_turn_left_out_by_its_row_still_does_not() -> None:
    tokenizer = byte_tokenizer()
    data = tokenize(records([], CHAT, untrained=frozenset({1})), tokenizer, train_on="all")
    (text,) = counted(data, tokenizer)
    assert "A1" not in text
    assert all(said in text for said in ("Q1", "Q2", "A2<|im_end|>"))


def test_a_row_whose_every_turn_is_left_out_is_a_bad_row() -> None:
    for row in (records([], CHAT, untrained=frozenset({1, 3})), records(CHAT[:1], CHAT[1:2], untrained={1})):
        with pytest.raises(UserError, match=r"rows\.jsonl row 1: nothing to train on"):
            tokenize(row, byte_tokenizer())
