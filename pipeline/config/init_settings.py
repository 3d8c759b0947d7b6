"""Values that `raylign init` puts into a starter: for the embedded base, and for any other."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.models.facts import ARCHITECTURES
from actors.models.spec import EMBEDDED_BASE, locate_embedded_base

ONLINE = ("ppo", "grpo", "rloo", "reinforce_pp", "online_dpo", "distill")
ABOUT: dict[str, str] = {
    "sft": "The stage `sft`: its name says its type. For another name add `type: sft`.",
    "reward": "A reward model, from pairs as DPO has them. It is no policy: later stages start from others.",
    "dpo": "The stage `dpo` starts from the last policy before it, and has it as its reference.",
    "kto": "The stage `kto` starts from the last policy before it, and has it as its reference.",
    "ppo": "Online: samples from the engines, rewards, updates of policy and critic, new weights synced.",
    "grpo": "Online: samples from the engines, each compared with all of its prompt.",
    "rloo": "Online: samples from the engines, each compared with the others of its prompt.",
    "reinforce_pp": "Online: samples from the engines, each compared with all of the generation.",
    "online_dpo": "Online: samples from the engines, the best and the worst of each prompt as a pair.",
    "distill": "Online: samples from the engines, each token scored by a teacher.",
}
ABOUT_DATA: dict[str, str] = {
    "sft": "Training data: hub id, file, directory or built-in; any usual layout.",
    "reward": "Preference pairs: prompt, chosen, rejected, in any usual layout.",
    "dpo": "Preference pairs: prompt, chosen, rejected, in any usual layout.",
    "kto": "Answers with a label (true: desirable), or preference pairs, which are taken apart.",
    **dict.fromkeys(ONLINE, "Prompts; their other columns reach the reward functions."),
}


@dataclass(frozen=True)
class Starter:
    """Values of a starter that are no defaults."""

    base: str
    data: dict[str, dict[str, Any]]
    """Type of stage, or `eval` -> its source."""
    stages: dict[str, dict[str, Any]]
    """Type of stage -> its settings."""
    max_tokens: int
    """New tokens of an answer in the evaluation."""
    targets: list[str] = field(default_factory=lambda: ["attention", "experts"])
    """Groups of modules that LoRA adapts."""
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of `model` beside its base."""
    resources: dict[str, Any] = field(default_factory=dict)
    """Settings of each role with processes."""
    gpu_comments: bool = False
    """What the run would set on GPUs stands in comments."""


_TOY_PAIRS = {"learning_rate": 5e-4, "batch_size": 64, "max_steps": 100}
TOY = Starter(
    EMBEDDED_BASE,
    {
        "sft": {"source": "builtin:arithmetic", "split": "train", "max_rows": 4096},
        **{
            kind: {"source": "builtin:arithmetic", "split": "preference", "max_rows": 4096}
            for kind in ("reward", "dpo", "kto")
        },
        **{kind: {"source": "builtin:arithmetic", "split": "prompts"} for kind in ONLINE},
        "eval": {"source": "builtin:arithmetic", "split": "test"},
    },
    {
        "sft": {"learning_rate": 1e-3, "batch_size": 64, "max_steps": 100},
        "reward": {"learning_rate": 1e-3, "batch_size": 64, "max_steps": 100},
        "dpo": {
            "learning_rate": 5e-4,
            "batch_size": 64,
            "max_steps": 100,
            "beta": 0.1,
            "loss_type": "sigmoid",
        },
        "kto": {"learning_rate": 5e-4, "batch_size": 64, "max_steps": 100, "beta": 0.1},
        **{
            kind: {"learning_rate": 2e-4, "batch_size": 64, "max_steps": 30, "max_completion_length": 16}
            for kind in ONLINE
        },
    },
    max_tokens=64,
)
"""The tiny base on the built-in task: minutes on two cores."""

REAL_DATA = {
    "sft": {"source": "YOUR_ANSWERS"},
    **{kind: {"source": "YOUR_PAIRS"} for kind in ("reward", "dpo", "kto")},
    **{kind: {"source": "YOUR_PROMPTS"} for kind in ONLINE},
    "eval": {"source": "YOUR_HELD_OUT_PROMPTS"},
}
"""Placeholders, which no data source is (`pipeline.data.spec.PLACEHOLDER`)."""
_OFFLINE = {"batch_size": 32, "max_length": 2048, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
REAL_SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"learning_rate": 1e-4, "num_train_epochs": 2, **_OFFLINE},
    "reward": {"learning_rate": 1e-4, "num_train_epochs": 1, **_OFFLINE},
    "dpo": {"learning_rate": 1e-5, "num_train_epochs": 1, **_OFFLINE, "beta": 0.1, "loss_type": "sigmoid"},
    "kto": {"learning_rate": 5e-6, "num_train_epochs": 1, **_OFFLINE, "beta": 0.1},
    **{
        kind: {
            "learning_rate": 1e-5,
            "num_train_epochs": 1,
            "batch_size": 64,
            "max_length": 2048,
            "max_completion_length": 1024,
        }
        for kind in ONLINE
    },
}
"""LoRA on a base of a billion parameters and more. Rates are those that TRL gives for adapters: about 1e-4
for SFT and 1e-5 for DPO (pages of SFTTrainer and DPOTrainer, "Train adapters with PEFT"); its default for
reward models; ten times its default, 1e-6, for online stages, and ten times its script's 5e-7 for KTO."""
GPU_MODEL = {"dtype": "bfloat16", "gradient_checkpointing": True}
GPU_RESOURCES = {"gpus": 1}


def settings_for(base: str, gpus: float = 0) -> Starter:
    """Values for a base; `gpus`: of this machine. The trainer and the engines need one each."""
    if _is_embedded(base):
        return TOY
    there = gpus >= 2
    return Starter(
        base,
        REAL_DATA,
        REAL_SETTINGS,
        max_tokens=1024,
        targets=_targets(base),
        model=GPU_MODEL if there else {},
        resources=GPU_RESOURCES if there else {},
        gpu_comments=not there,
    )


def _is_embedded(base: str) -> bool:
    """True for the embedded base, by its name or its directory."""
    if base == EMBEDDED_BASE:
        return True
    try:
        return Path(base).expanduser().resolve() == Path(locate_embedded_base()).resolve()
    except (OSError, ValueError):  # no path, or no embedded base in this installation
        return False


def _targets(base: str) -> list[str]:
    """Groups for LoRA: experts where the base has any, or may have."""
    try:
        model_type = json.loads((Path(base).expanduser() / "config.json").read_text())["model_type"]
        row = ARCHITECTURES.get(model_type)
    except (OSError, ValueError, KeyError, TypeError):  # a hub id, or no base: `validate` says so
        row = None
    return ["attention", "mlp"] if row is not None and not row.is_moe else ["attention", "experts"]
