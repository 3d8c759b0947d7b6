"""The runs in which processes are lost: small, quick to start, every role in processes of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.chaos.nodes import ENGINE, HEAD
from tests.whole_runs.runs import TINY_MOE, command_of
from tests.whole_runs.test_online import REWARD

DATA = {"source": "builtin:arithmetic", "max_rows": 64}
SAVE_STEPS = 4
OFFLINE = {"dpo": "preference", "sft": "train", "reward": "preference", "kto": "preference"}
"""Stages that make no samples, and the split of the data that they read."""
POLICIES: dict[str, dict[str, Any]] = {
    "one": {"workers": 1},
    "base": {"sharding": "base"},
    "full": {"sharding": "full"},
    "experts": {"sharding": "experts"},
    "experts+full": {"workers": 4, "sharding": "experts+full", "expert_parallel_size": 2},
    "tensor": {"tensor_parallel_size": 2},
    "whole": {"sharding": "full"},
    "guests": {},
}
"""Forms of a policy, of two workers where nothing else is said; `whole` trains all weights, by SFT."""
MANY_LOSSES = {"max_restarts": 1000, "restart_window": 1.0}
"""One run goes through more losses than any real one."""
APART = {"workers": 1, "cpus": 0.1}


def limits(patience: float) -> dict[str, Any]:
    """Deadlines, seconds: several times what each phase takes on two quiet cores, times `patience`."""
    quick = dict.fromkeys(("update", "logprobs", "generate", "evaluate", "save", "restore"), 10 * patience)
    quick |= {"sync": 15 * patience, "start": 40 * patience, "load": 40 * patience, "call": 15 * patience}
    return quick | MANY_LOSSES


def _run(output: Path, patience: float, stages: dict[str, Any], roles: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "chaos", "output_dir": str(output), "seed": 5,
        "model": {"base": str(TINY_MOE), "lora": {"r": 4, "lora_alpha": 8}},
        "stages": stages, "roles": roles, "limits": limits(patience),
    }  # fmt: skip


def reward_model(directory: Path) -> Path:
    """A reward model for all runs, made once: an adapter that changes nothing yet, and a random head."""
    from actors.models.spec import LoraSpec, ModelSpec
    from actors.trainer.model_host import ModelHost
    from actors.trainer.spec import HostSpec

    place = directory / "reward" / "adapter"
    if not place.is_dir():
        place.mkdir(parents=True)
        host = ModelHost(HostSpec(model=ModelSpec(base=str(TINY_MOE), lora=LoraSpec(r=4, lora_alpha=8))))
        host.add_adapter("reward")
        host.add_head("reward", "normal")
        host.saving.save_adapter("reward", place)
    return place


def ppo(output: Path, steps: int, patience: float, reward: Path, evaluates: bool = True) -> dict[str, Any]:
    """PPO: two policy ranks, a reference, a critic, a reward model and two engines."""
    stage = {
        "data": DATA | {"split": "prompts"},
        "rewards": ["shaped:digits", {"source": str(reward), "weight": 0.5}],
        "batch_size": 16, "steps_per_generation": 2, "num_iterations": 2, "num_generations": 2,
        "max_completion_length": 24, "max_length": 64, "max_steps": steps, "save_steps": SAVE_STEPS,
        "save_total_limit": 2, "learning_rate": 1e-4,
    }  # fmt: skip
    roles = dict.fromkeys(("reference", "critic", "reward"), APART)
    roles |= {"policy": APART | {"workers": 2}, "rollout": APART | {"workers": 2}}
    run = _run(output, patience, {"ppo": stage}, roles)
    if evaluates:
        run["eval"] = {
            "data": DATA | {"split": "test"}, "models": ["ppo"], "max_rows": 32,
            "sampling": {"max_tokens": 48},
        }  # fmt: skip
    return run


def on_nodes(config: dict[str, Any], address: str) -> dict[str, Any]:
    """The same run on a cluster, with its engines on nodes of their own or on those of the policy."""
    away = config["roles"]["rollout"].get("share", "rollout")
    roles = {
        name: role if "share" in role else role | {"resources": {ENGINE if name == away else HEAD: 1}}
        for name, role in config["roles"].items()
    }
    return config | {"ray": {"address": address}, "roles": roles}


def grpo(output: Path, steps: int, patience: float) -> dict[str, Any]:
    """GRPO on one rank and two engines, for the soak: as small as it goes."""
    stage = {
        "data": DATA | {"split": "prompts"}, "rewards": "shaped:digits", "batch_size": 16,
        "num_generations": 4, "max_completion_length": 8, "max_length": 64, "max_steps": steps,
        "save_steps": 25, "save_total_limit": 2, "learning_rate": 1e-4,
    }  # fmt: skip
    roles = {"policy": APART | {"workers": 2}, "rollout": APART | {"workers": 2}}
    return _run(output, patience, {"grpo": stage}, roles)


def offline(kind: str, output: Path, steps: int, patience: float) -> dict[str, Any]:
    """A stage of `OFFLINE` on two policy ranks; DPO with a reference of its own, which is asked in every
    step."""
    stage = {
        "data": DATA | {"split": OFFLINE[kind]}, "batch_size": 8, "max_steps": steps, "max_length": 128,
        "save_steps": SAVE_STEPS, "save_total_limit": 2, "learning_rate": 1e-4,
    }  # fmt: skip
    roles = {"policy": APART | {"workers": 2}} | ({"reference": APART} if kind == "dpo" else {})
    return _run(output, patience, {kind: stage}, roles)


def form(name: str, output: Path, steps: int, patience: float) -> dict[str, Any]:
    """A policy of `POLICIES` in GRPO with one engine; its samples are scored, as two steps use them."""
    policy = APART | {"workers": 2} | POLICIES[name]
    if name == "whole":
        run = offline("sft", output, steps, patience)
        run["model"]["lora"] = None
        return run | {"roles": {"policy": policy}}
    run = grpo(output, steps, patience)
    run["stages"]["grpo"] |= {"steps_per_generation": 2, "save_steps": SAVE_STEPS}
    engines = {"share": "policy", "offload": "all"} if name == "guests" else APART
    return run | {"roles": {"policy": policy, "rollout": engines}}


def stage_of(scene: str) -> str:
    """The stage in which processes are lost."""
    if scene in OFFLINE:
        return scene
    if scene == "whole":
        return "sft"
    return "grpo" if scene in POLICIES else "ppo"


def command_for(directory: Path, config: dict[str, Any]) -> list[str]:
    """The command of a run, its reward function beside it."""
    command = command_of(directory, config)
    (directory / "shaped.py").write_text(REWARD)
    return command
