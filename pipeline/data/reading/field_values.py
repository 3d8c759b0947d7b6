"""Reads single values of raw rows: booleans, numbers, JSON in text, nulls of Arrow, text to be encoded."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from decimal import Decimal
from typing import Any

import numpy as np

from pipeline.data.reading.bad_rows import MISSING_COLUMN, TOO_DEEP, WRONG_TYPE, RowProblem
from pipeline.data.reading.raw_rows import MAX_DEPTH, is_too_deep, problem_of

_TRUE = frozenset({"true", "yes", "1", "1.0", "desirable", "good", "chosen", "positive"})
_FALSE = frozenset({"false", "no", "0", "0.0", "undesirable", "bad", "rejected", "negative"})
"""Words for true and false in csv files and in class names of `datasets`, in small letters."""


def true_or_false(value: Any, where: str) -> bool:
    """A label, also where the file has no booleans: 1 and 0, 1.0 and 0.0, and the usual words."""
    if is_blank(value):
        raise RowProblem(MISSING_COLUMN, f"{where} is null")
    if isinstance(value, str) and (word := value.strip().lower()) in _TRUE | _FALSE:
        return word in _TRUE
    if isinstance(value, bool | int | float | Decimal | np.bool_) and value in (0, 1):
        return bool(value)
    raise RowProblem(WRONG_TYPE, f"{where} is {value!r}, not true or false")


def finite_number(value: Any, where: str) -> float:
    """A number, also where the file holds it as text."""
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, int | float | Decimal | str):
        with suppress(ValueError, OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise RowProblem(WRONG_TYPE, f"{where} is {value!r}, not a number")
    return number


def is_blank(value: Any) -> bool:
    """True for a missing field: null, or empty text of a csv file."""
    return value is None or (isinstance(value, str) and not value.strip())


def from_json(value: Any, where: str) -> Any:
    """`value`, or what its JSON says where a csv or parquet file holds it as text. Blank text is None."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowProblem(WRONG_TYPE, f"{where} is not valid JSON") from error
    if isinstance(found, dict | list) and is_too_deep(found):
        raise RowProblem(TOO_DEEP, f"{where}: more than {MAX_DEPTH} levels")
    return found


def without_nulls(value: Any) -> Any:
    """`value` without the keys that are null, at any depth (TRL's `remove_none_values`).

    Arrow gives all structs of a column the same keys, so that a tool gets the parameters of every other
    row's tools. Nulls in lists stay: those the row itself has.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    return value


def check_encodable(value: Any, where: str) -> None:
    """Refuse half surrogate pairs in any text of `value`, keys too (no tokenizer takes them), and depths
    that a template can't follow."""
    if isinstance(value, str) and value.isascii():
        return
    if problem := problem_of({where: value}):
        raise RowProblem(*problem)


def type_name(value: Any) -> str:
    """Name of a value's type in messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        int: "a number",
        float: "a number",
        bool: "true/false",
        bytes: "bytes",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
