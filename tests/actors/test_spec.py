"""Descriptions of settings: the docstring below a field, its own text, or that of the class above."""

from __future__ import annotations

from pydantic import Field

from actors.spec import Spec


class Above(Spec):
    """Settings that another spec inherits."""

    rate: float = 1.0
    """Share of rows,
    between 0 and 1."""
    silent: int = 0


class Below(Above):
    """Settings with a part."""

    rate: float = 0.5
    part: Above = Field(default_factory=Above, description="A part.")
    """Not this."""
    count: int = 1
    """Rows."""


def test_a_field_is_described_by_the_docstring_below_it_or_by_the_class_above() -> None:
    named = {name: Below.description(name) for name in ("rate", "silent", "part", "count", "unknown")}
    assert named == {
        "rate": "Share of rows,\nbetween 0 and 1.",
        "silent": "",
        "part": "A part.",
        "count": "Rows.",
        "unknown": "",
    }


def test_the_schema_carries_descriptions_of_every_part() -> None:
    schema = Below.model_json_schema()
    assert schema["properties"]["count"]["description"] == "Rows."
    assert schema["properties"]["part"]["description"] == "A part."
    assert "description" not in schema["properties"]["silent"]
    assert schema["$defs"]["Above"]["properties"]["rate"]["description"].startswith("Share of rows")
