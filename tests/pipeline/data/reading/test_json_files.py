"""json and json lines: read right, or refused with the file and the row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.errors import UserError
from pipeline.data.reading.json_files import json_rows
from pipeline.data.reading.raw_rows import MAX_DEPTH

GOOD = '{"text": "a"}'


def read(tmp_path: Path, content: str | bytes, name: str = "a.jsonl") -> list[str]:
    """Each row: its values as JSON, or its problem."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = list(json_rows(path, "train", None))
    return [
        str(row.problem).removeprefix(f"{path} ") if row.problem else json.dumps(row.values) for row in rows
    ]


def nested(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


@pytest.mark.parametrize("form", ["lines", "list"])
@pytest.mark.parametrize(
    ("row", "said"),
    [
        (r'{"text": "\ud800"}', "not UTF-8: text at character 0"),
        (r'{"turns": [{"role": "a", "x": ["b\uDC00d"]}]}', "not UTF-8: turns[0].x[0] at character 1"),
        (r'{"a": {"\ud83d": 1}}', "not UTF-8: a key of a"),
        (nested(MAX_DEPTH + 1), "nested too deeply: more than 100 levels"),
        ("[1]", "wrong type: list, not an object"),
        ("null", "wrong type: NoneType, not an object"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_among_good_ones(tmp_path: Path, form: str, row: str, said: str) -> None:
    if form == "lines":
        assert read(tmp_path, f"{GOOD}\n{row}\n{GOOD}\n") == [GOOD, f"row 2: {said}", GOOD]
    else:
        assert read(tmp_path, f"[{GOOD}, {row},\n{GOOD}]", "a.json") == [GOOD, f"row 2: {said}", GOOD]


@pytest.mark.parametrize("levels", [2_000, 100_000])
def test_thousands_of_levels_are_a_bad_row_of_lines(tmp_path: Path, levels: int) -> None:
    said = ["row 1: nested too deeply: more than 100 levels", GOOD]
    assert read(tmp_path, f"{nested(levels)}\n{GOOD}\n") == said
    assert read(tmp_path, f'{{"a": {"[" * levels}{"]" * levels}}}\n{GOOD}\n') == said


def test_what_is_unusual_but_right_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, '{"a": NaN, "b": 1, "b": 2}') == ['{"a": NaN, "b": 2}']
    assert read(tmp_path, r'{"a": "\ud83d\ude00"}') == [r'{"a": "\ud83d\ude00"}']
    assert read(tmp_path, nested(MAX_DEPTH)) == [nested(MAX_DEPTH)]
    assert read(tmp_path, f"{GOOD}\r\n\r\n{GOOD}") == [GOOD, GOOD]
    assert read(tmp_path, f"[\n{GOOD},\n{GOOD}\n]\n") == [GOOD, GOOD]
    assert read(tmp_path, f"[1, 2]\n{GOOD}\n") == ["row 1: wrong type: list, not an object", GOOD]
    assert read(tmp_path, json.dumps(json.loads(GOOD), indent=1), "a.json") == [GOOD]
    assert read(tmp_path, f"{{broken\n{GOOD}\n", "a.json")[1] == GOOD
    assert read(tmp_path, "", "a.json") == []


def test_a_byte_that_is_not_utf8_names_its_row_of_a_list(tmp_path: Path) -> None:
    rows = read(tmp_path, b'[{"text": "a"},\n {"text": "caf\xe9"}]', "a.json")
    assert rows == [GOOD, "row 2: not UTF-8: text at character 3"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"[{GOOD}, {GOOD}, {{]", "not valid JSON at row 3 of its list"),
        (f"[{GOOD}, {GOOD}", "not valid JSON at row 2 of its list"),
        (f"[{GOOD} {GOOD}]", "not valid JSON at row 1 of its list"),
        (f"[{GOOD}, {nested(5_000)}]", "not valid JSON at row 2 of its list: nested too deeply"),
        ('{\n "data": [\n  {"a": 1},\n', "not valid JSON: Expecting"),
    ],
)
def test_a_damaged_list_is_one_message(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(UserError, match=r"a\.json") as error:
        read(tmp_path, content, "a.json")
    assert said in str(error.value)
    assert len(error.value.problems) == 1
