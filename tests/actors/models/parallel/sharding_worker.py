"""One rank of two with a sharded base, as a process: `python sharding_worker.py RANK BASE OUT INIT...`.

`init` addresses: one for each host that is made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from actors.algorithms.sft import SftLoss
from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import HostSpec, OptimSpec
from tests.actors.trainer.host_cases import random_rows, sft_batch

OPTIM = OptimSpec(learning_rate=2e-3, lr_scheduler_type="constant", weight_decay=0.01)
HALF, STEPS = 1, 3
ROWS = random_rows(6 * STEPS, longest=24)
LORA = LoraSpec(r=4, targets=["attention", "experts", "router"])


def spec(base: str, sharding: str, lora: LoraSpec | None = LORA) -> HostSpec:
    """Gradient checkpointing with everything."""
    model = ModelSpec(
        base=base, lora=lora, moe=MoeSpec(router_aux_loss_coef=0.0), gradient_checkpointing=True
    )
    return HostSpec(model=model, sharding=sharding, max_tokens_per_micro_batch=60)  # type: ignore[arg-type]


def losses(host: ModelHost, first: int, last: int) -> list[float]:
    """Of some steps; each has more micro-batches on one rank than on the other, the last has one row."""
    batches = [sft_batch(ROWS[6 * s : 6 * s + (1 if s == STEPS - 1 else 5)]) for s in range(first, last)]
    return [host.updates.update(batch, SftLoss(), first + i)["loss"] for i, batch in enumerate(batches)]


def trained(host: ModelHost, role: str | None) -> ModelHost:
    """Ready for its first step."""
    if role is not None:
        host.add_adapter(role)
    host.updates.prepare_training(role, OPTIM, STEPS)
    return host


def facts(host: ModelHost, role: str | None) -> dict[str, Any]:
    """What does not depend on how weights are split."""
    expected = host.weight_source.expected(role, "float32")
    prepared = host.weight_source.prepare(1, role, "merged" if role is None else "adapter", "float32")
    found = {
        "frozen": host.frozen_digest(),
        "expected": None if expected is None else expected.digests,
        "payload": None if prepared is None else prepared.offer.digest,
    }
    host.weight_source.prepare(2, role, "merged", "float32", 200_000)
    sent = host.weight_source.send_later([])
    if sent is not None and sent.expected is not None:
        assert len(sent.part_digests) > 2
        found["parts"] = [list(sent.part_digests), sent.expected.digests == found["expected"]]
    return found if host.state.ranks.rank == 0 else {}


def trained_whole(host: ModelHost, out: Path) -> dict[str, Any]:
    """Full fine-tuning with a checkpoint on the way, and what it leaves; closes the host."""
    found: dict[str, Any] = {"whole": losses(host, 0, HALF)}
    host.saving.save_checkpoint(out / "whole")
    found["whole"] += losses(host, HALF, STEPS)
    host.saving.save_model(out / "whole-model")
    found["whole facts"] = facts(host, None)
    host.close()
    return found


def run(base: str, rank: int, out: Path, inits: list[str]) -> dict[str, Any]:
    """LoRA in both ways, each from the other's checkpoint, then full fine-tuning."""
    results: dict[str, Any] = {}
    addresses = iter(inits)
    before: Path | None = out / "one"
    for sharding in ("full", "base"):
        host = trained(ModelHost(spec(base, sharding), rank, 2, next(addresses), timeout_s=60), "policy")
        assert host.describe()["sharding"] == sharding
        if sharding == "full":
            results["full"] = losses(host, 0, HALF)
            host.saving.save_checkpoint(out / "full")
            assert host.saving.load_checkpoint(out / "one") == HALF
        else:
            assert host.saving.load_checkpoint(out / "full") == HALF
        results[f"{sharding} after {before.name if before else 'full'}"] = losses(host, HALF, STEPS)
        before = None
        host.saving.save_adapter("policy", out / f"{sharding}-adapter")
        results[f"{sharding} facts"] = facts(host, "policy")
        host.close()
    host = trained(ModelHost(spec(base, "full", None), rank, 2, next(addresses), timeout_s=60), None)
    return results | trained_whole(host, out)


if __name__ == "__main__":
    rank_, base_, out_, *inits_ = sys.argv[1:]
    found_ = run(base_, int(rank_), Path(out_), inits_)
    (Path(out_) / f"rank-{rank_}.json").write_text(json.dumps(found_))
