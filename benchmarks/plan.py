"""Predicted against measured: peak memory of ranks on the CPU, and the time of their steps.

python -m benchmarks.plan                  # all cases, one after the other; some minutes
python -m benchmarks.plan llama-lora ...   # some of them
python -m benchmarks.plan --seconds        # with predicted CPU seconds; all cases: kept in results/

Each rank is a process of its own with a `ModelHost`, told what a stage would tell it: same adapters, batches
and losses. All sequences are as long as the stage lets them be. Counted is anonymous memory beyond the
imports, and weights in mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.sharding_memory import Memory
from benchmarks.workloads import MEDIUM_MODEL, ROOT

STEPS = 3
"""Moments exist after the first."""
TIMEOUT_S = 900
RESULTS = ROOT / "benchmarks" / "results"
VOCABULARY = 8192
DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
"""27 M parameters with these 8 layers, and 8 M in embedding and head."""
MIXTURE: dict[str, Any] = {**DENSE, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", DENSE),
    "qwen3": ("qwen3", {**DENSE, "num_hidden_layers": 6}),
    "qwen3_moe": ("qwen3_moe", {**MEDIUM_MODEL, "max_position_embeddings": 4096}),
    "mixtral": ("mixtral", {**MIXTURE, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "olmoe": (
        "olmoe",
        {
            **{k: v for k, v in MIXTURE.items() if k != "head_dim"},
            "intermediate_size": 256,
            "num_experts": 32,
            "num_experts_per_tok": 4,
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **{k: v for k, v in MIXTURE.items() if k != "head_dim"},
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 1024,
            "num_experts": 16,
            "num_experts_per_tok": 4,
        },
    ),
}
"""Name -> (architecture, sizes): random bases of 35 to 124 M parameters."""
SFT: dict[str, Any] = {"type": "sft", "batch_size": 16, "max_length": 256, "max_tokens_per_micro_batch": 2048}
TWICE = {**SFT, "batch_size": 32}
PPO: dict[str, Any] = {
    "type": "ppo",
    "rewards": ["r"],
    "critic_init": "r",
    "batch_size": 16,
    "max_length": 256,
    "max_completion_length": 192,
    "max_tokens_per_micro_batch": 2048,
}


@dataclass(frozen=True)
class Case:
    """One run that is predicted and measured."""

    family: str
    stage: dict[str, Any] = field(default_factory=lambda: dict(SFT))
    model: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    sharding: str = "none"


FULL = {"lora": None}
AGAIN = {"gradient_checkpointing": True}
CASES: dict[str, Case] = {
    "llama-lora": Case("llama", model={"lora": {"targets": ["attention", "mlp"]}}),
    "llama-lora-checkpointing": Case("llama", model={"lora": {"targets": ["attention", "mlp"]}, **AGAIN}),
    "llama-full": Case("llama", model=FULL),
    "llama-full-checkpointing": Case("llama", model={**FULL, **AGAIN}),
    "qwen3-lora-1024-tokens": Case(
        "qwen3", {**SFT, "max_length": 1024, "batch_size": 4}, {"lora": {"targets": ["attention"]}}
    ),
    "qwen3_moe-lora": Case("qwen3_moe"),
    "qwen3_moe-lora-padded": Case("qwen3_moe", {**SFT, "packing": False}),
    "qwen3_moe-lora-checkpointing": Case("qwen3_moe", model=AGAIN),
    "qwen3_moe-full": Case("qwen3_moe", model=FULL),
    "qwen3_moe-dpo": Case("qwen3_moe", {**SFT, "type": "dpo", "batch_size": 8}),
    "qwen3_moe-ppo-four-roles": Case("qwen3_moe", PPO),
    "mixtral-lora": Case("mixtral"),
    "olmoe-lora": Case("olmoe", model={"lora": {"r": 32, "expert_rank": "r/top_k"}}),
    "qwen2_moe-lora": Case(
        "qwen2_moe", model={"lora": {"targets": ["attention", "experts", "shared_experts"]}}
    ),
    "qwen3_moe-lora-base-over-2": Case("qwen3_moe", TWICE, ranks=2, sharding="base"),
    "qwen3_moe-full-over-2": Case("qwen3_moe", TWICE, FULL, ranks=2, sharding="full"),
    "qwen3_moe-experts-over-2": Case("qwen3_moe", TWICE, ranks=2, sharding="experts"),
    "llama-lora-bfloat16": Case(
        "llama", model={"dtype": "bfloat16", "lora": {"targets": ["attention", "mlp"]}}
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument("--seconds", action="store_true", help="compare the time of a step too")
    parser.add_argument("--parts", action="store_true", help="print the predicted parts")
    parser.add_argument("--rank", help="internal: be a rank, JSON")
    args = parser.parse_args()
    if args.rank:
        work(**json.loads(args.rank))
        return
    rows = []
    print(LINE.format("case", "predicted", "measured", "off", "CPU s", "predicted", "off"))
    with tempfile.TemporaryDirectory() as directory:
        for name in args.cases or CASES:
            rows.append(compared(name, Path(directory), args.seconds))
            print(said(rows[-1]), flush=True)
            if args.parts:
                print("   ", rows[-1]["parts"], flush=True)
    if args.seconds and not args.cases:
        (RESULTS / "plan.json").write_text(json.dumps(rows, indent=2) + "\n")


LINE = "{:32} {:>10} {:>10} {:>7} {:>8} {:>10} {:>7}"


def said(row: dict[str, Any]) -> str:
    """A row of the table, in MiB and percent."""
    off = f"{100 * (row['predicted'] / row['measured'] - 1):+.0f} %"
    seconds = row.get("predicted_seconds")
    times = (f"{row['cpu_seconds']:.2f}", "", "")
    if seconds:
        late = f"{100 * (seconds / row['cpu_seconds'] - 1):+.0f} %"
        times = (f"{row['cpu_seconds']:.2f}", f"{seconds:.2f}", late)
    mib = [f"{row[key] / 2**20:,.0f}" for key in ("predicted", "measured")]
    return LINE.format(row["case"], *mib, off, *times)


def compared(name: str, directory: Path, seconds: bool = False) -> dict[str, Any]:
    """Predicted and measured bytes of the largest rank of a case, and CPU seconds of a step on it."""
    from actors.models.facts import measure_cpu

    case = CASES[name]
    base, budget = written_base(case.family, directory), budget_of(case)
    parts = predicted(budget)
    found: dict[str, Any] = {"case": name, "predicted": sum(parts.values()), "parts": parts}
    found |= measured(case, base)
    if seconds:
        rates = measure_cpu(budget.sizes, 1, budget.config.model.dtype)
        found["rates"] = rates._asdict()
        found["predicted_seconds"] = predicted_seconds(budget, found["rates"])
    return found


def predicted_seconds(budget: Any, rates: dict[str, float]) -> float:
    """Of a step, at rates that were measured."""
    from pipeline.planning.costs.seconds import step_time

    timed = replace(budget, device=replace(budget.device, **rates))
    return sum(s for part, s in step_time(timed, "s").parts.items() if part not in NOT_DONE)


def budget_of(case: Case) -> Any:
    """What a case needs, from its config and that of its base alone."""
    from transformers import AutoConfig

    from actors.models.facts import base_sizes
    from pipeline.planning.costs.devices import cpu
    from pipeline.planning.costs.processes import Budget

    model_type, values = FAMILIES[case.family]
    sizes = base_sizes(AutoConfig.for_model(model_type, **values))
    return Budget(config_of(case, Path(case.family)), sizes, cpu(16 * 2**30), {})


def predicted(budget: Any) -> dict[str, int]:
    """Parts of a rank of the policy, beyond its imports."""
    here = [p for p in budget.processes() if p.role == "policy" and p.stage == "s"]
    apart = ("framework", "version that is sent")
    return {part: size for part, size in here[-1].parts.items() if part not in apart}


NOT_DONE = ("generation", "sync")
"""Parts of a step that a rank does not do here."""


def config_of(case: Case, base: Path) -> Any:
    """The run that a case is a stage of."""
    from pipeline.config.run_config import RunConfig

    model = {"base": str(base), "moe": {"router_aux_loss_coef": 0.0}, **case.model}
    stage = {"data": "builtin:arithmetic", **case.stage}
    stages = {"s": stage}
    if stage["type"] == "ppo":
        stages = {"r": {"data": "builtin:arithmetic", "type": "reward"}, "s": stage}
    policy = {"workers": case.ranks, "sharding": case.sharding}
    return RunConfig.model_validate(
        {"name": "planned", "model": model, "stages": stages, "roles": {"policy": policy}}
    )


def written_base(family: str, directory: Path) -> Path:
    """A random base of a family, made once."""
    path = directory / family
    if not path.exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from actors.models.tiny import byte_tokenizer

        model_type, sizes = FAMILIES[family]
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **sizes)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    return path


def measured(case: Case, base: Path) -> dict[str, float]:
    """Bytes and CPU seconds of the rank that needs most."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        init = f"tcp://127.0.0.1:{s.getsockname()[1]}" if case.ranks > 1 else None
    ranks = []
    for number in range(case.ranks):
        what = json.dumps({"case": vars(case), "base": str(base), "rank": number, "init": init})
        command = [sys.executable, "-m", "benchmarks.plan", "--rank", what]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
    try:
        found = [json.loads(rank.communicate(timeout=TIMEOUT_S)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return {key: max(one[key] for one in found) for key in found[0]}


def work(case: dict[str, Any], base: str, rank: int, init: str | None) -> None:
    """One rank: what a stage asks of it; prints bytes and CPU seconds."""
    from actors.trainer.model_host import ModelHost
    from actors.trainer.spec import HostSpec

    family = FAMILIES[case["family"]][0]
    __import__(f"transformers.models.{family}.modeling_{family}")  # Before counting begins.
    config, memory = config_of(Case(**case), Path(base)), Memory()
    role = config.roles.policy
    spec = HostSpec(model=config.model, threads=1, sharding=role.sharding)
    host = ModelHost(spec, rank, role.workers, init)
    stage = config.stages["s"]
    host.set_batching(stage.packing, stage.max_tokens_per_micro_batch)
    prepare, step = (_prepare_ppo, _ppo_step) if stage.online else (_prepare_one, _one_step)
    prepare(host, config)
    mapped = mapped_bytes(host.state.model)
    began = 0.0
    for number in range(STEPS):
        if number == STEPS - 1:
            began = time.process_time()
        step(host, config, number)
    seconds = time.process_time() - began
    print(json.dumps({"measured": memory.since_start()[1] + mapped, "cpu_seconds": seconds}))
    host.close()


def mapped_bytes(model: Any) -> int:
    """Bytes of parameters that lie in mapped files, as transformers leaves what needs no conversion: they are
    no anonymous memory, but have to be there for every pass."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [tuple(int(x, 16) for x in f[0].split("-")) for f in lines if f[-1].endswith(".safetensors")]
    found = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    inside = [p for p in found if any(a <= p.data_ptr() < b for a, b in spans)]
    return sum(p.numel() * p.element_size() for p in inside)


def _rows(stage: Any, seed: int) -> Any:
    """A step's rows, random, each as long as the stage lets it be."""
    import numpy as np

    from actors.batches import Batch

    k = 2 if stage.records == "preference" else 1
    n, length = stage.batch_size * k, stage.max_length
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, (n, length)).tolist()
    prompt = length - stage.max_completion_length if stage.online else 1
    return Batch.from_sequences(ids, [[False] * prompt + [True] * (length - prompt)] * n, k)


def _prepare_one(host: Any, config: Any) -> None:
    stage, role = config.stages["s"], None if config.model.lora is None else "s"
    if role is not None:
        host.add_adapter(role)
    host.updates.prepare_training(role, stage.optim_spec(), STEPS)


def _one_step(host: Any, config: Any, number: int) -> None:
    import numpy as np

    stage, role = config.stages["s"], None if config.model.lora is None else "s"
    batch = _rows(stage, number)
    if stage.reference_columns:
        logps = host.scores.logprobs(batch, None)
        columns = dict(zip(stage.reference_columns, np.reshape(logps, (-1, 2)).T, strict=True))
        batch = batch.with_columns(**columns)
    host.updates.update(batch, stage.loss(), number, role)


def _prepare_ppo(host: Any, config: Any) -> None:
    stage = config.stages["s"]
    for role in ("r", "s", "s:critic"):
        host.add_adapter(role, trainable=role != "r")
        if role != "s":
            host.add_head(role, "normal")
        if role != "r":
            host.updates.prepare_training(role, stage.optim_spec(), STEPS, keep=True)


def _ppo_step(host: Any, config: Any, number: int) -> None:
    """What the ranks do in a step of PPO, each update on all samples; SFT's loss in place of the surrogate,
    which reads the same."""
    import numpy as np

    from actors.algorithms.sft import SftLoss
    from actors.algorithms.value import ValueLoss

    stage = config.stages["s"]
    batch = _rows(stage, number)
    returns = np.zeros(int(batch.loss_mask.sum()))
    for role in ("s", None):
        host.scores.token_logprobs(batch, role)
    host.scores.scores(batch, "r")
    host.scores.values(batch, "s:critic")
    valued = batch.with_token_columns(returns=returns, old_values=returns)
    for _ in range(stage.updates_per_step):
        host.updates.update(batch, SftLoss(), number, "s")
        host.updates.update(valued, ValueLoss(), number, "s:critic")


if __name__ == "__main__":
    main()
