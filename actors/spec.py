"""Base class of all settings, and names of values that have changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """Base of every spec: unknown keys are refused, field docstrings become descriptions."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class OldValue(FutureWarning):
    """Warning of a value under the name that an earlier version had for it; the message has the new name."""


class NewNames:
    """Validator of a field some of whose values were called otherwise: reads both names, warns of the old.

    Stands in an `Annotated` as `BeforeValidator(NewNames("model.lora.expert_impl", {"beside": "unmerged"}))`,
    so that JSON schema and messages have the new names only.
    """

    def __init__(self, key: str, names: Mapping[str, str]) -> None:
        """`key`: the field's, dotted, as users write it. `names`: old -> new."""
        self.key, self.names = key, names

    def __call__(self, value: Any) -> Any:
        new = self.current(value)
        if new != value:
            warnings.warn(
                f"{self.key}: '{value}' is now called '{new}'; the old name still works",
                OldValue,
                stacklevel=2,
            )
        return new

    def current(self, value: Any) -> Any:
        """The value under its present name."""
        return self.names.get(value, value) if isinstance(value, str) else value
