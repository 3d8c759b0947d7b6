"""Templates that write the date: a run keeps the one it began with."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from actors.models.tiny import CHAT_TEMPLATE, byte_tokenizer
from pipeline.artifacts.manifest import Manifest, new_directory
from pipeline.data.tokens.chat_format import chat_format
from pipeline.data.tokens.template_date import FILE, date_of_run, fix_date, keep_date, writes_date

DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y %H:%M:%S') + '<|im_end|>\n' }}"
QUESTION = [{"role": "user", "content": "2+2?"}]


def dated() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = DATED + CHAT_TEMPLATE
    return tokenizer


def rendered(tokenizer: Any) -> str:
    return chat_format(tokenizer).render(QUESTION, {}, for_generation=True)


def test_the_template_sees_the_date_that_was_fixed() -> None:
    tokenizer = dated()
    fix_date(tokenizer, datetime(2024, 2, 29, 23, 59, 58))
    assert "Today is 29 Feb 2024 23:59:58" in rendered(tokenizer)


def test_without_one_it_sees_the_clock() -> None:
    assert f"{datetime.now():%b %Y}" in rendered(dated())


def test_a_run_keeps_its_first_date(tmp_path: Path) -> None:
    first = keep_date(dated(), tmp_path)
    assert first is not None
    held = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(held | {"date": "2023-05-06T07:08:09"}))
    tokenizer = dated()
    assert keep_date(tokenizer, tmp_path) == datetime(2023, 5, 6, 7, 8, 9)
    assert "Today is 06 May 2023 07:08:09" in rendered(tokenizer)


def test_looking_at_a_run_writes_nothing(tmp_path: Path) -> None:
    assert keep_date(dated(), tmp_path, write=False) is not None
    assert list(tmp_path.iterdir()) == []


def test_a_template_without_a_date_leaves_no_file(tmp_path: Path) -> None:
    assert keep_date(byte_tokenizer(), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("template", [None, {"default": CHAT_TEMPLATE, "tool_use": DATED}])
def test_tokenizers_without_a_template_and_with_several(template: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert writes_date(tokenizer) is (template is not None)


def test_a_run_from_before_dates_were_kept_goes_on_with_the_day_of_its_first_stage(tmp_path: Path) -> None:
    for stage, created in (("dpo", "2025-03-05T10:00:00Z"), ("sft", "2025-03-04T10:00:00Z")):
        manifest = Manifest(type="adapter", stage=stage, fingerprint="f", created=created)
        with new_directory(tmp_path / stage, manifest):
            pass
    date = date_of_run(tmp_path)
    assert date is not None
    assert date.timestamp() == datetime.fromisoformat("2025-03-04T10:00:00+00:00").timestamp()
