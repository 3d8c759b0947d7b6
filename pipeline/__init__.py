"""Preference tuning of mixture-of-experts models: `from pipeline import plan, run, validate`.

The package decides what runs, in which order, with which data, and reports what came out; the work is done in
`actors`. The names of `pipeline.api` are looked up when they are asked for, so that importing a part of the
package loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import RunResult, StageResult, load, plan, run, validate

__all__ = ["RunResult", "StageResult", "load", "plan", "run", "validate"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import pipeline.api

        return getattr(pipeline.api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
