"""Names that a run may give, and those that are taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.rewards.functions import EXACT_MATCH

if TYPE_CHECKING:
    pass


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


RESERVED_NAMES = frozenset(
    {"base", "eval", "logs", "plots", "cache", "policy", "reference", "critic", "rollout", EXACT_MATCH}
    | {"start", "initial_adapter"}
)
"""`base` names the model that a run starts from; the others are directories, roles and rules of a run, and
adapters of its hosts that belong to no stage."""


MODULE_NAMES = frozenset(
    {"model", "base_model", "base_layer", "layers", "self_attn", "mlp", "feed_forward", "block_sparse_moe"}
    | {"experts", "gate", "router", "shared_expert", "shared_experts", "lora_A", "lora_B", "weight"}
)
"""Parts of a parameter's path. PEFT looks for an adapter's name anywhere in that path: an adapter `1` would
be saved with what the others have in layer 1, and they without it."""


VIEWS = ("reference", "critic", "reward")
"""Roles that can be views of the policy's host."""
