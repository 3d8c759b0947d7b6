"""`raylign inspect` shows rows, tokens and loss mask of a source."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from actors.errors import UserError
from actors.models.tiny import byte_tokenizer
from pipeline.data.inspect import inspect, kind_of
from pipeline.data.spec import DataSpec


def shown(path: Path, rows: list[dict], *, terminal: bool = False) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    colours = "standard" if terminal else None
    console = Console(file=io.StringIO(), width=300, force_terminal=terminal, color_system=colours)  # type: ignore[arg-type]
    inspect([DataSpec(source=str(path))], byte_tokenizer(), max_length=64, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tokens_that_count_are_in_brackets_without_colours(tmp_path: Path) -> None:
    text = shown(tmp_path / "a.jsonl", [{"question": "2+2?", "answer": "4"}])
    assert "[[4<|im_end|>]]" in text
    assert "assistant: 4" in text
    assert "1 of 1 rows, layout question_answer" in text


def test_tokens_that_count_are_coloured_on_a_terminal(tmp_path: Path) -> None:
    text = shown(tmp_path / "a.jsonl", [{"question": "2+2?", "answer": "4"}], terminal=True)
    assert "[[" not in text
    assert "42m4<|im_end|>" in text


def test_both_answers_of_a_preference_are_shown(tmp_path: Path) -> None:
    text = shown(tmp_path / "a.jsonl", [{"prompt": "2+2?", "chosen": "4", "rejected": "[five]"}])
    assert "assistant (rejected): [five]" in text
    assert "[[[five]<|im_end|>]]" in text


def test_bad_rows_are_listed_with_what_a_run_would_do(tmp_path: Path) -> None:
    rows = [
        {"question": "2+2?", "answer": "4"},
        {"question": "1+1?", "answer": ""},
        {"question": "q" * 99, "answer": "4"},
    ]
    text = shown(tmp_path / "a.jsonl", rows)
    assert "row 2: empty answer" in text
    assert "row 3: prompt fills max_length" in text
    assert "a run stops at these rows" in text


@pytest.mark.parametrize(
    ("policies", "stops"), [(("error",), 1), (("skip",), 0), (("error", "skip"), 1), (("skip", "error"), 1)]
)
def test_the_rows_at_which_a_run_would_stop_are_counted(
    tmp_path: Path, policies: tuple[str, ...], stops: int
) -> None:
    console, specs = Console(file=io.StringIO(), width=300), []
    for at, policy in enumerate(policies):
        bad = [{"question": "1+1?", "answer": ""}] * (at + 1 if policy == "skip" else 1)
        rows = [{"question": "2+2?", "answer": "4"}, *bad]
        path = tmp_path / f"{at}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        specs.append(DataSpec(source=str(path), on_bad_row=policy))  # type: ignore[arg-type]
    assert inspect(specs, byte_tokenizer(), console=console) == stops
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("a run stops at" in said) == bool(stops)
    if policies == ("error", "skip"):
        assert "a run stops at 1 of these rows" in said


def test_prompts_are_shown_with_their_other_columns(tmp_path: Path) -> None:
    text = shown(tmp_path / "a.jsonl", [{"prompt": "2+2?", "answer": 4}])
    assert "<|im_start|>assistant" in text
    assert "answer='4'" in text


def test_the_kind_follows_from_the_layout(tmp_path: Path) -> None:
    kinds = {}
    for name, row in {
        "preference": {"messages": [{"role": "user", "content": "q"}], "rejected_response": "a"},
        "sft": {"messages": [{"role": "user", "content": "q"}]},
        "prompt": {"prompt": "q"},
    }.items():
        (tmp_path / name).with_suffix(".jsonl").write_text(json.dumps(row))
        kinds[name] = kind_of(DataSpec(source=str((tmp_path / name).with_suffix(".jsonl"))))
    assert all(name == kind for name, kind in kinds.items())


def test_the_files_of_a_split_are_named(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "b"}\n')
    assert "split train: train.jsonl" in shown_source(tmp_path / "train.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [("", r"a\.jsonl': no rows \(split train\)"), ("[1]\n{\n", r"row 1: wrong type: list, not an object")],
)
def test_a_source_without_a_readable_row_is_no_question_of_layouts(
    tmp_path: Path, content: str, said: str
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        kind_of(DataSpec(source=str(tmp_path / "a.jsonl")))


def shown_source(path: Path, source: Path) -> str:
    path.write_text('{"text": "a"}\n')
    console = Console(file=io.StringIO(), width=300)
    inspect([DataSpec(source=str(source))], byte_tokenizer(), console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]
