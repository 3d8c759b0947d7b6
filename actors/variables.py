"""Environment variables of this process, changed for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


def set_variables(new: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set variables, or unset those that are None; what they were, for the same call to put back."""
    before = {name: os.environ.get(name) for name in new}
    for name, value in new.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


@contextmanager
def variables_set(new: Mapping[str, str | None]) -> Iterator[None]:
    """`set_variables` while it lasts."""
    before = set_variables(new)
    try:
        yield
    finally:
        set_variables(before)
