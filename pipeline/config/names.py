"""Names that a run may give, and those that are taken."""

from __future__ import annotations

from pipeline.rewards.spec import EXACT_MATCH
from pipeline.roles import ROLES
from pipeline.stages.specs.registry import STAGE_TYPES

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
NAME_RULE = "up to 100 letters, digits, '.', '_' and '-', starting with a letter or digit"


RESERVED_NAMES = frozenset(
    {"base", "eval", "logs", "plots", "cache", "start", "initial_adapter", EXACT_MATCH}
    | (ROLES.keys() - STAGE_TYPES.keys())
)
"""`base` names the model that a run starts from; the others are directories, roles and rules of a run, and
adapters of its hosts that belong to no stage."""


MODULE_NAMES = frozenset(
    {"model", "base_model", "base_layer", "layers", "self_attn", "mlp", "feed_forward", "block_sparse_moe"}
    | {"experts", "gate", "router", "shared_expert", "shared_experts", "lora_A", "lora_B", "weight"}
)
"""Parts of a parameter's path. PEFT looks for an adapter's name anywhere in that path: an adapter `1` would
be saved with what the others have in layer 1, and they without it."""
