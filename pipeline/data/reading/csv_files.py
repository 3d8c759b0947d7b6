"""Reads rows of csv files."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from actors.errors import UserError
from pipeline.data.reading.bad_rows import HEADER_AGAIN, NOT_UTF8, WRONG_TYPE
from pipeline.data.reading.raw_rows import Row, bad_row, read_bytes

_OTHER_SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars"}


def csv_rows(file: Path) -> Iterator[Row]:
    """Rows of a csv file: strings, by the names in its first row. Empty lines don't count.

    Raises:
        UserError: the file can't be read, its names are not clear, or a quote is never closed.
    """
    csv.field_size_limit(1 << 30)  # the default, 128 KiB, refuses long documents
    text = read_bytes(file).decode(errors="surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] = []
    number, line = 0, 0
    rows: list[Row] = []
    try:
        for fields in reader:
            began, line = line, reader.line_num
            if not fields:
                continue
            if not header:
                header = fields
                _check_header(file, header)
                continue
            number += 1
            rows.append(_row(str(file), number, header, fields))
    except csv.Error as error:
        raise UserError(f"data source '{file}': row {number + 1}: not valid CSV: {error}") from error
    if header and _never_closed(text, began, line):
        where = f"row {number}" if number else "the header"
        raise UserError(
            f"data source '{file}': not valid CSV: a quote opens in {where} (line {began + 1}) and never "
            "closes"
        )
    yield from rows


def _check_header(file: Path, header: list[str]) -> None:
    where = f"data source '{file}': the header"
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise UserError(
            f"{where} names {', '.join(map(repr, twice))} more than once; rename one of the columns"
        )
    if not all(_is_utf8(name) for name in header):
        raise UserError(f"{where} is {NOT_UTF8}; save the file as UTF-8")
    for separator, name in _OTHER_SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            raise UserError(
                f"{where} has no comma, but {name}; save the file with commas between the columns"
            )


def _row(file: str, number: int, header: list[str], fields: list[str]) -> Row:
    if len(fields) > len(header):
        return bad_row(file, number, WRONG_TYPE, "more fields than the header has")
    if fields == header:
        return bad_row(file, number, HEADER_AGAIN)
    if not all(map(_is_utf8, fields)):
        return bad_row(file, number, NOT_UTF8)
    return Row(file, number, dict(zip(header, fields, strict=False)))


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= c <= "\udcff" for c in text)


def _never_closed(text: str, began: int, end: int) -> bool:
    """True where a quote of the last row (lines `began` to `end`) never closes; only strict reading shows
    it."""
    try:
        list(csv.reader(islice(io.StringIO(text, newline=""), began, end), strict=True))
    except csv.Error as error:
        return "unexpected end" in str(error)
    return False
