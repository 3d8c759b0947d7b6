"""Tokens that end a turn, by the template and by the base, reach engines, scores and merged models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.batches.generations import SamplingSpec
from actors.errors import UserError
from actors.models.lora.merge import merge_adapter
from actors.models.tiny import PAD, TURN_END, byte_tokenizer, write_tiny_base
from actors.models.turn_ends import TurnEnds, turn_ends, write_turn_ends
from tests.pipeline.data.tokens.one_row import CHATML

PHI = CHATML[: CHATML.index("{% if")] + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
WORDS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n### end\n' }}{% endfor %}"


def tokenizer_with(template: Any, eos: str = PAD) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    return tokenizer


def base_with(path: Path, eos: Any, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"vocab_size": 320, "eos_token_id": 256} | config))
    if eos is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return path


END, TEXT_END = (byte_tokenizer().convert_tokens_to_ids(token) for token in (TURN_END, PAD))


def test_the_templates_token_and_the_tokenizers_eos_both_end_a_turn() -> None:
    ends = turn_ends(tokenizer_with(CHATML))
    assert (ends.turn, ends.eos, ends.added) == ((END,), (TEXT_END,), (END,))
    assert ends.ids == (END, TEXT_END)


def test_a_base_may_name_several_eos_and_its_generation_config_goes_first(tmp_path: Path) -> None:
    listed = turn_ends(tokenizer_with(CHATML), base_with(tmp_path / "listed", [TEXT_END, END, 7]))
    assert (listed.eos, listed.added) == ((TEXT_END, END, 7), ())
    alone = turn_ends(tokenizer_with(CHATML), base_with(tmp_path / "alone", None, eos_token_id=9))
    assert alone.eos == (TEXT_END, 9)
    nested = {"eos_token_id": None, "vocab_size": None, "text_config": {"eos_token_id": [9]}}
    base = base_with(tmp_path / "nested", None)
    (base / "config.json").write_text(json.dumps({"text_config": nested["text_config"]}))
    assert turn_ends(tokenizer_with(CHATML), base).eos == (TEXT_END, 9)


def test_a_token_without_a_row_in_the_embedding_ends_nothing(tmp_path: Path) -> None:
    ends = turn_ends(tokenizer_with(CHATML), base_with(tmp_path, [1000], vocab_size=END))
    assert ends.ids == (TEXT_END,)


@pytest.mark.parametrize(
    ("template", "turn", "texts"),
    [
        (PHI, (END,), ()),
        (WORDS, (), ("\n### end",)),
        ({"default": CHATML, "tool_use": CHATML.replace("<|im_end|>", "<|im_start|>")}, (END, END - 1), ()),
        ("{{ raise_exception('only with tools') }}", (), ()),
        (None, (), ()),
    ],
    ids=["two tokens", "words", "named templates", "refused", "no template"],
)
def test_templates_of_every_kind(template: Any, turn: tuple[int, ...], texts: tuple[str, ...]) -> None:
    ends = turn_ends(tokenizer_with(template))
    assert (ends.turn, ends.texts) == (turn, texts)


def test_added_tokens_of_white_space_are_no_end() -> None:
    tokenizer = tokenizer_with(CHATML.replace("<|im_end|>\n", "\n\n<|im_end|>"))
    tokenizer.add_tokens(["\n\n"])
    assert turn_ends(tokenizer).turn == (END,)


def test_sampling_stops_at_all_of_them_and_at_what_was_asked_for() -> None:
    asked = SamplingSpec(stop=["###", TURN_END], stop_token_ids=[65])
    found = TurnEnds((9,), (TEXT_END, 9), ("\nuser:",)).sampling(
        asked, tokenizer_with(CHATML), "eval.sampling"
    )
    assert found.stop == ["###", "\nuser:"]
    assert found.stop_token_ids == [65, END, 9, TEXT_END]
    assert found.max_tokens == asked.max_tokens


def test_a_stop_string_that_no_engine_can_find_is_refused_with_what_to_write() -> None:
    asked = SamplingSpec(stop=[f"{TURN_END}\n"], stop_token_ids=[5000])
    with pytest.raises(UserError) as caught:
        TurnEnds().sampling(asked, tokenizer_with(CHATML), "stages.grpo")
    first, second = caught.value.problems
    assert first.startswith("stages.grpo.stop")
    assert first.endswith(f"write the token alone: '{TURN_END}'")
    assert second.startswith("stages.grpo.stop_token_ids: 5000")


def test_the_description_says_where_each_comes_from() -> None:
    said = turn_ends(tokenizer_with(CHATML)).describe(tokenizer_with(CHATML))
    assert said == "a turn ends at <|im_end|> (258, the chat template) or <|endoftext|> (256, EOS)"


def test_a_models_generation_config_gets_the_templates_end_once(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", TEXT_END)
    tokenizer_with(CHATML).save_pretrained(base)
    for _ in range(2):
        write_turn_ends(base)
        assert json.loads((base / "generation_config.json").read_text())["eos_token_id"] == [END, TEXT_END]


def test_a_merged_model_stops_where_its_turns_end(tmp_path: Path) -> None:
    from actors.models.base.loading import load_base
    from actors.models.lora.adapters import attach_lora, save_adapter
    from actors.models.spec import LoraSpec, ModelSpec

    base = write_tiny_base(tmp_path / "base", num_hidden_layers=1, eos_token_id=TEXT_END)
    tokenizer_with(CHATML).save_pretrained(base)
    peft = attach_lora(load_base(ModelSpec(base=str(base))), LoraSpec(r=2), "default", 0)
    save_adapter(peft, "default", tmp_path / "adapter")
    merge_adapter(str(base), tmp_path / "adapter", tmp_path / "merged", check=False)
    held = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert held["eos_token_id"] == [END, TEXT_END]
    assert json.loads((base / "generation_config.json").read_text())["eos_token_id"] == TEXT_END
