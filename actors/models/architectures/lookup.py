"""Finds the row of an architecture: names of LoRA targets, the router, packing, limits.

There is one row per transformers `model_type`, in `actors.models.architectures.table`. Every row is covered
by tests that train it, save it, merge it and compare packed with padded batches; what vLLM needs to run it is
in `actors.models.architectures.vllm_table`. An architecture without a row is refused with the reason; with
`model.allow_untested` it gets a row derived from its modules (`actors.models.architectures.derived`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.errors import UserError
from actors.models.architectures.row import Architecture, Router
from actors.models.architectures.table import REFUSED, ROWS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "ARCHITECTURES",
    "REFUSED",
    "Architecture",
    "Router",
    "allow_untested",
    "architecture_of",
    "replay_problem",
    "unsupported",
]

ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in ROWS}

_UNTESTED: dict[str, Architecture] = {}
"""Rows derived in this process for models whose user allowed it."""


def allow_untested(row: Architecture) -> None:
    """Let `architecture_of` find a derived row; those of tested and refused architectures are not
    replaced."""
    if row.model_type not in ARCHITECTURES and row.model_type not in REFUSED:
        _UNTESTED[row.model_type] = row


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The row of `config.model_type`.

    Raises:
        UserError: the architecture has no row; the message says why, or lists those that have one.
    """
    problem = unsupported(config.model_type)
    if problem is not None:
        raise UserError(problem)
    return ARCHITECTURES.get(config.model_type) or _UNTESTED[config.model_type]


def unsupported(model_type: str) -> str | None:
    """The reason why an architecture can't be used; None when it can."""
    if model_type in ARCHITECTURES or model_type in _UNTESTED:
        return None
    known = ", ".join(sorted(ARCHITECTURES))
    if model_type in REFUSED:
        return f"model.base: architecture '{model_type}' is not supported: {REFUSED[model_type]}"
    return (
        f"model.base: architecture '{model_type}' is not supported: it has no tested row in the table of "
        f"architectures. Supported: {known}. With model.allow_untested: true it is tried, after a probe "
        "that compares the engine with the trainer"
    )


def replay_problem(model_type: str) -> str | None:
    """The reason why routes of an architecture can't be replayed (`model.moe.router_replay`), or None."""
    row = ARCHITECTURES.get(model_type)
    if row is not None and row.router is None:
        return f"a {model_type} model has no router"
    if row is not None and row.router is not None and row.router.gates is not None:
        return None
    why = row.router.why_no_replay if row is not None and row.router is not None else "it is not in the table"
    known = ", ".join(t for t, one in ARCHITECTURES.items() if one.router is not None and one.router.gates)
    return f"the experts of a {model_type} model can't be replayed: {why}. They can for: {known}"
