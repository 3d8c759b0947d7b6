"""Answers that every rank of a group has alike: the first rank hands its own over, the others a proof that
theirs is the same.

Log-probabilities of a step are megabytes, and every rank has all of them. So the driver gets them once, and
from each rank a digest of 128 bits, which it compares.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.errors import InvariantViolation

ROUNDING = 1e-3
"""Largest difference between two sums over an array that is taken for rounding, as a share of the sum of
magnitudes."""


@dataclass(frozen=True)
class Proof:
    """Facts of a value, in a few bytes."""

    digest: str
    """Of every bit of it."""
    form: str
    """Of its keys, types and shapes, and of all that is no float."""
    sums: tuple[float, ...]
    """Of each float or array of floats: sums of magnitudes, of values, and of values by their places. Empty
    where all bits have to be the same."""

    def same(self, other: Proof) -> bool:
        """True if two ranks have the same value: bit for bit, or within `ROUNDING` where there are sums."""
        if self.digest == other.digest or self.form != other.form or not self.sums:
            return self.digest == other.digest
        mine, theirs = (np.reshape(np.array(one.sums), (-1, 3)) for one in (self, other))
        near = np.abs(mine - theirs) <= ROUNDING * np.maximum(mine[:, :1], theirs[:, :1])
        return bool(np.all(near | (np.isnan(mine) & np.isnan(theirs)) | (mine == theirs)))


@dataclass(frozen=True)
class Answer:
    """One rank's answer to a call whose result is the same on every rank."""

    proof: Proof
    value: Any
    """Of the first rank; None of the others."""


def agreed(answers: Sequence[Answer], who: Sequence[str], method: str) -> Any:
    """The value of ranks that agree; `who`: their names.

    Raises:
        InvariantViolation: a rank has another one than the first.
    """
    first, *others = answers
    other = [name for name, one in zip(who[1:], others) if not first.proof.same(one.proof)]
    if other:
        raise InvariantViolation(
            other[0],
            method,
            f"{', '.join(other)}: another result of this call than {who[0]}'s",
            "report this",
        )
    return first.value


def proof_of(value: Any, own: Collection[str] = (), exact: bool = True) -> Proof:
    """Facts of a value made of dicts, lists, tuples, numpy arrays, numbers, texts and None.

    `own`: keys of dicts whose values are each rank's own, such as seconds; they are left out.
    `exact`: ranks must not even differ by rounding.

    Raises:
        TypeError: it is made of anything else.
    """
    from xxhash import xxh3_128

    bits, form, sums = xxh3_128(), xxh3_128(), list[float]()

    def note(text: str) -> None:
        bits.update(text.encode())
        form.update(text.encode())

    def walk(one: Any) -> None:
        if isinstance(one, dict):
            kept = {key: one[key] for key in one if key not in own}
            note(f"dict {list(kept)}|")
            for part in kept.values():
                walk(part)
        elif isinstance(one, list | tuple):
            note(f"{type(one).__name__} {len(one)}|")
            for part in one:
                walk(part)
        elif isinstance(one, float | np.ndarray | np.generic):
            array = np.asarray(one)
            note(f"{array.dtype.str} {array.shape}|")
            bits.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
            if array.dtype.kind == "f":
                sums.extend(() if exact else _sums(array))
            else:
                form.update(array.tobytes())
        elif one is None or isinstance(one, bool | int | str):
            note(f"{type(one).__name__} {one!r}|")
        else:
            raise TypeError(f"ranks can't agree on a {type(one).__name__}")

    walk(value)
    return Proof(bits.hexdigest(), form.hexdigest(), tuple(sums))


def _sums(array: np.ndarray) -> tuple[float, float, float]:
    values = array.astype(np.float64, copy=False).reshape(-1)
    places = np.linspace(-1.0, 1.0, len(values))
    return float(np.abs(values).sum()), float(values.sum()), float(values @ places)
