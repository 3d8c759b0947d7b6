"""The table of public sets in docs/data.md, row by row: what a set is understood as, or what does it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from actors.errors import UserError
from pipeline.data.spec import LayoutName
from tests.pipeline.data.reading.public_sets import SETS, A, B, Q
from tests.pipeline.data.reading.rows import load

KINDS = {"sft": "sft", "dpo": "preference", "kto": "unpaired", "online": "prompt", "eval": "prompt"}
PAGE = Path(__file__).parents[4] / "docs" / "data.md"
TABLE = PAGE.read_text().split("### Public sets")[1].split("\n## ")[0]
LINES = [
    tuple(cell.strip() for cell in line.strip("|").split("|")) for line in TABLE.splitlines() if "|" in line
]
WRITTEN = [line for line in LINES[2:] if len(line) == 3]
SAID = {A, B, "", "And?", "Be brief.", "Hi.", "Hello.", "2+2=4\n#### 4", '{"sum": 4}'}
SAID |= {"You are a helpful assistant."}


def test_every_set_is_in_the_table_and_has_rows() -> None:
    assert {name for name, _, _ in WRITTEN} == set(SETS)


@pytest.mark.parametrize(("name", "stage", "said"), WRITTEN, ids=lambda x: str(x)[:30])
def test_a_public_set_is_what_the_table_says(tmp_path: Path, name: str, stage: str, said: str) -> None:
    rows, kind = SETS[name], KINDS[stage]
    layout = re.match(r"`(\w+)`", said)
    if layout and layout[1] in get_args(LayoutName):
        records = load(tmp_path, rows, kind)
        assert records.layout == layout[1]
        turns = [m for r in records.rows for part in (r.prompt, *r.answers) for m in part]
        assert {m["content"] for m in turns} <= SAID | {Q}
        assert [m["role"] for m in turns if m["content"] == Q][:1] == ["user"]
    else:
        with pytest.raises(UserError) as error:
            load(tmp_path, rows, kind)
        for piece in re.findall(r"`columns: \{.*?\}`|several answers|one answer|`messages`", said):
            assert piece in str(error.value)
    for columns in re.findall(r"`columns: (\{.*?\})`", said):
        records = load(tmp_path, rows, kind, columns=yaml.safe_load(columns))
        assert len(records) == len(rows)
        assert kind != "prompt" or records.columns.get("answer") in (None, ["4"])


def test_calls_of_the_sets_with_tools_are_the_assistants(tmp_path: Path) -> None:
    xlam = load(tmp_path, SETS["xLAM function calling"], "sft")[0]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    assert xlam.completion == [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert [tool["name"] for tool in xlam.template_kwargs["tools"]] == ["add"]
    glaive = load(tmp_path, SETS["glaive-function-calling-v2"], "sft")[0].completion
    assert [m["role"] for m in glaive] == ["system", "user", "assistant", "tool", "assistant"]
    assert glaive[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 2, "b": 2}'}


def test_a_transcript_without_marks_is_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 1: wrong type: chat does not begin with 'USER:'"):
        load(tmp_path, [{"system": "", "chat": "hello"}], "sft")


def test_a_list_of_texts_is_a_conversation_but_no_answer(tmp_path: Path) -> None:
    assert load(tmp_path, [{"messages": [Q, A]}], "sft")[0].completion[1]["content"] == A
    with pytest.raises(UserError, match=r"row 1: wrong type: completion\[0\] is a string, not a message"):
        load(tmp_path, [{"prompt": Q, "completion": [A, B]}], "sft")


def test_a_prompt_that_is_a_transcript_is_its_turns_and_stays_text_for_bases_without_a_template(
    tmp_path: Path,
) -> None:
    prompt = f"\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: {Q}\n\nAssistant:"
    record = load(tmp_path, [{"prompt": prompt, "chosen": f" {A}", "rejected": f" {B}"}], "preference")[0]
    assert [(m["role"], m["content"]) for m in record.prompt] == [
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", Q),
    ]
    assert record.plain == (prompt, f" {A}", f" {B}")
