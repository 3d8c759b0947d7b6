"""Made-up input: damaged bytes of good files, and values that nobody expects in their place."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

ODD_TEXT = [
    "", " ", "\0", "\x1b[31m", "\r\n", "\ufeff", "é", "\u202e", "\U0001f9e0", "a" * 5000, "../x", "/", "~",
    "*", "[", "{}", "{{ x }}", "%s", "builtin:", "null", "nan", "-", "--", "a:b", "a.b", "a/b", "\\", "'",
    '"',
]  # fmt: skip
ODD_NUMBERS = [
    0, -1, 1, 2, 3, 10**6, 10**9, 10**12, 10**18, 2**31, 2**63 - 1, 2**63, 10**30, -(10**18),
    0.5, -0.0, 1e-308, 1e300, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip


def texts() -> st.SearchStrategy[str]:
    """Any text, half surrogate pairs too."""
    return st.one_of(st.sampled_from(ODD_TEXT), st.text(st.characters(codec=None), max_size=40))


def scalars() -> st.SearchStrategy[Any]:
    """Values without others in them, also those that YAML and Arrow have and JSON has not."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(ODD_NUMBERS),
        st.integers(),
        st.floats(),
        texts(),
        st.binary(max_size=20),
        st.dates(),
        st.datetimes(timezones=st.none() | st.just(datetime.UTC)),
        st.decimals(),
    )


def json_scalars() -> st.SearchStrategy[Any]:
    """What JSON has, and what Python writes as JSON: NaN, numbers of any size, half surrogate pairs."""
    return st.one_of(
        st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), st.integers(), st.floats(), texts()
    )


def values(
    leaves: st.SearchStrategy[Any], keys: st.SearchStrategy[Any] | None = None
) -> st.SearchStrategy[Any]:
    """Lists and mappings of `leaves`; a few of them are deep."""
    keys = texts() if keys is None else keys
    nested = st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=12,
    )
    deep = st.builds(_nested, leaves, st.sampled_from([3, 99, 100, 101, 500, 3000]), st.booleans())
    return st.one_of(leaves, nested, nested, deep)


def _nested(leaf: Any, levels: int, lists: bool) -> Any:
    for _ in range(levels):
        leaf = [leaf] if lists else {"a": leaf}
    return leaf


@st.composite
def damaged(draw: st.DrawFn, good: Sequence[bytes], words: Sequence[bytes] = ()) -> bytes:
    """One of `good` with up to six edits, mostly one: bytes cut, changed, doubled or put in, words put in."""
    data = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 6]))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, min(len(data) - at, 64)))
        kind = draw(
            st.sampled_from(["cut", "bytes", "flip", "double", "end", *(["word"] * 4 if words else [])])
        )
        if kind == "cut":
            del data[at : at + length]
        elif kind == "bytes":
            data[at : at + length] = draw(st.binary(max_size=16))
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "double":
            data[at:at] = data[at : at + length] * draw(st.sampled_from([1, 2, 50]))
        elif kind == "end":
            del data[at:]
        elif kind == "word":
            data[at : at + draw(st.sampled_from([0, length]))] = draw(st.sampled_from(words))
    return bytes(data)


@st.composite
def altered(
    draw: st.DrawFn, good: Sequence[Any], leaves: st.SearchStrategy[Any], keys: Sequence[str] = ()
) -> Any:
    """One of `good`, plain values in each other, with one to four places replaced, dropped or added to."""
    value = draw(st.sampled_from(good))
    names = st.one_of(st.sampled_from(keys), texts()) if keys else texts()
    for _ in range(draw(st.integers(1, 4))):
        value = _altered(draw, value, values(leaves, names), names)
    return value


def _altered(draw: st.DrawFn, node: Any, new: st.SearchStrategy[Any], names: st.SearchStrategy[str]) -> Any:
    inner = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    if not inner or draw(st.integers(0, 5)) == 0:
        return draw(new)
    at = draw(st.sampled_from(inner))
    how = draw(st.sampled_from(["below", "below", "below", "drop", "add", "wrap", "unwrap"]))
    copy = dict(node) if isinstance(node, dict) else list(node)
    if how == "drop":
        del copy[at]
    elif how == "add" and isinstance(copy, dict):
        copy[draw(names)] = draw(new)
    elif how == "add":
        copy.insert(at, draw(new))
    elif how == "wrap":
        copy[at] = [copy[at]]
    elif how == "unwrap" and isinstance(copy[at], list) and copy[at]:
        copy[at] = copy[at][0]
    else:
        copy[at] = _altered(draw, copy[at], new, names)
    return copy
