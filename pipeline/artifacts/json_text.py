"""JSON text of whatever a run writes into its files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, **how: Any) -> str:
    """JSON of a value, with null for NaN and infinities: Python would write words that JSON doesn't have,
    and strict readers (JavaScript, jq) refuse the whole file for one of them.

    `how`: further arguments of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:  # Rare, and the only way to find out without a walk through every value.
        return json.dumps(_without_nan(value), allow_nan=False, **how)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return value
