"""The run's YAML as JSON schema, for editors: completion, documentation on hover, red underlines."""

from __future__ import annotations

from typing import Any

from pipeline.config.run_config import RunConfig
from pipeline.stages.specs.registry import STAGE_TYPES, RlStage

_DATA = {"$ref": "#/$defs/DataSpec"}
_NAMED_REWARD = {"$ref": "#/$defs/RewardSpec"}


def json_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a run's YAML, with what the loader accepts in short.

    pydantic does not know that a source of data or of rewards may be a bare string or a single mapping,
    nor that a stage's type may be left out where its name says it, and the run's name where its file has one.
    """
    schema = RunConfig.model_json_schema()
    schema = _with_short_sources(schema)
    schema["required"].remove("name")  # a file has one
    stages = schema["properties"]["stages"]
    kinds = {name: {"$ref": f"#/$defs/{cls.__name__}"} for name, cls in STAGE_TYPES.items()}
    stages["properties"] = kinds
    stages["additionalProperties"] = {"required": ["type"], "oneOf": list(kinds.values())}
    for name, cls in STAGE_TYPES.items():
        schema["$defs"][cls.__name__]["properties"]["type"] = {
            **schema["$defs"][cls.__name__]["properties"]["type"],
            "const": name,
        }
        if issubclass(cls, RlStage) and cls.needs_rewards:
            needed = [{"required": [key]} for key in ("rewards", "env", "agent")]
            schema["$defs"][cls.__name__]["anyOf"] = needed
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Raylign run", **schema}


def _with_short_sources(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_short_sources(item) for item in node]
    if not isinstance(node, dict):
        return node
    items = node.get("items")
    sources = items == _DATA or (isinstance(items, dict) and _NAMED_REWARD in items.get("oneOf", []))
    if node.get("type") == "array" and sources:
        one = [{"type": "string"}, node["items"]]
        rest = {key: value for key, value in node.items() if key not in ("type", "items", "minItems")}
        return {**rest, "anyOf": [*one, {"type": "array", "minItems": 1, "items": {"anyOf": one}}]}
    return {key: _with_short_sources(value) for key, value in node.items()}
