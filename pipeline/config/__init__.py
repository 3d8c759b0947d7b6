"""The YAML of a run: specs of all rooms as one, loading, overrides, messages."""
