"""Base class of all settings; settings that name a row of a table; names of values that have changed."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
import warnings
from collections.abc import Collection, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema


class Spec(BaseModel):
    """Base of every spec: unknown keys are refused, field docstrings become descriptions."""

    # Most specs are parts of others: what nobody makes by itself needs no validator of its own.
    model_config = ConfigDict(extra="forbid", validate_default=True, defer_build=True)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        made = handler(schema)
        for name, about in handler.resolve_ref_schema(made).get("properties", {}).items():
            if text := cls.description(name):
                about.setdefault("description", text)
        return made

    @classmethod
    def description(cls, name: str) -> str:
        """Description of a field: its own, or the docstring below it; "" if there is neither.

        Read from the source when it is asked for. pydantic's `use_attribute_docstrings` reads it for every
        class at import, which takes a run's driver 0.1 s and its workers as much.
        """
        field = cls.model_fields.get(name)
        if field is not None and field.description:
            return field.description
        return next((found[name] for one in cls.__mro__ if name in (found := _docstrings(one))), "")

    @classmethod
    def from_settings(cls, other: Spec, **more: Any) -> Self:
        """A spec of this class with the values of all fields that `other` has too, and `more`."""
        names = cls.model_fields.keys() & type(other).model_fields.keys()
        return cls(**{name: getattr(other, name) for name in names} | more)


@functools.cache
def _docstrings(cls: type) -> dict[str, str]:
    """Docstrings below the fields that a spec itself declares."""
    if not issubclass(cls, Spec) or cls is Spec:
        return {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node, below in itertools.pairwise(definition.body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(node.target, ast.Name)
            found[node.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return found


class KeyOf:
    """`Annotated[str, KeyOf(TABLE)]`: a string that is a key of the table.

    Messages and JSON schema are those of a Literal of the keys; the table is read when a value is validated
    and when the schema is made, so that a row that was added later counts.
    """

    def __init__(self, table: Collection[str]) -> None:
        self.table = table

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._known)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.table), "type": "string"}

    def _known(self, value: Any) -> str:
        if isinstance(value, str) and value in self.table:
            return value
        *others, last = (f"'{key}'" for key in self.table)
        raise PydanticKnownError("literal_error", {"expected": " or ".join([", ".join(others), last])})


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
