"""csv: read right, or refused with the file and the row."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.errors import UserError
from pipeline.data.reading.csv_files import csv_rows


def read(tmp_path: Path, content: str | bytes) -> list[dict[str, str] | str]:
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = list(csv_rows(path))
    return [str(row.problem).removeprefix(f"{path} ") if row.problem else row.values for row in rows]


def test_what_is_unusual_but_right_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, '\n\nq,a\r\n"1, ""x""\n2",3\r\n') == [{"q": '1, "x"\n2', "a": "3"}]
    assert read(tmp_path, "q,a\n1\x00,2\n") == [{"q": "1\x00", "a": "2"}]
    assert read(tmp_path, "q,a\n1\n") == [{"q": "1"}]
    assert read(tmp_path, 'q,a\n1,a "b" c\n') == [{"q": "1", "a": 'a "b" c'}]
    assert read(tmp_path, ",q\n0,1\n") == [{"": "0", "q": "1"}]
    assert read(tmp_path, "text\na;b\n") == [{"text": "a;b"}]
    assert read(tmp_path, "") == read(tmp_path, "q,a\n") == []


def test_a_header_in_the_middle_is_a_bad_row(tmp_path: Path) -> None:
    rows = read(tmp_path, "q,a\n1,2\nq,a\n3,4\n")
    assert rows == [{"q": "1", "a": "2"}, "row 2: the header a second time", {"q": "3", "a": "4"}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("q,a,q\n1,2,3\n", "the header names 'q' more than once"),
        ("q\ta\n1\t2\n", "the header has no comma, but tabs"),
        ("q;a\n1;2\n", "the header has no comma, but semicolons"),
        (b"caf\xe9,a\n1,2\n", "the header is not UTF-8"),
        ('q,a\n1,2\n3,"4\n5,6\n', r"a quote opens in row 2 \(line 3\) and never closes"),
        ('q,"a\n1,2\n', r"a quote opens in the header \(line 1\) and never closes"),
        ('q,a\n1,"2', r"a quote opens in row 1 \(line 2\)"),
    ],
)
def test_a_file_that_is_not_clear_is_one_message(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        read(tmp_path, content)
    assert "a.csv" in str(error.value)
    assert len(error.value.problems) == 1
