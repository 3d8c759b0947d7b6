"""A weight sync by its parts, adapter against merged weights, on bases of 1 M to 200 M parameters.

python -m benchmarks.sync            # five bases, five syncs of each payload, in turns
python -m benchmarks.sync --quick    # the smallest base, two syncs of each: does it run?
python -m benchmarks.sync --bases 190m --payloads parts    # one payload alone: what memory it takes
python -m benchmarks.sync --base DIRECTORY --payloads adapter    # a base of your own, expert_rank r/top_k
python -m benchmarks.sync --payloads adapter lora    # LoRA on attention alone, merged and in slots
python -m benchmarks.sync --threads 2    # of trainer and engine each

Trainer and engine are the product's own, one process each; between two syncs the trainer takes an optimizer
step. The proof of each sync (read-back digests, probes) is part of its time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.figures import Execution, Ratio, console, rows
from benchmarks.meter import cpu_seconds, peak_rss_bytes
from benchmarks.online_workloads import MOE_60M
from benchmarks.workloads import LEARNING_RATE, LORA_ALPHA, LORA_R, MEDIUM_MODEL

BASES: dict[str, dict[str, Any]] = {
    "1m": {},
    "10m": {"hidden_size": 256, "num_experts": 16, "moe_intermediate_size": 160, "vocab_size": 2048},
    "59m": MOE_60M,
    "124m": MEDIUM_MODEL,
    "190m": {**MOE_60M, "num_experts": 64},
}
"""Overrides of the tiny Qwen3-MoE config, by parameters."""
PAYLOADS: dict[str, dict[str, Any]] = {
    "adapter": {"payload": "adapter"},
    "merged": {"payload": "merged"},
    "parts": {"payload": "merged", "packed_buffer_size_bytes": 64 * 2**20},
    "lora": {"payload": "lora"},
}
"""`SyncSpec` of each; `parts`: merged weights of which no more than a buffer is held at once; `lora`: slots.
Experts have none on the CPU, so that with it all payloads are of LoRA on attention alone."""
SLOTS = ("q_proj", "k_proj", "v_proj", "o_proj")
PARTS = ("gather", "pack", "wire", "load", "verify")
SIDES = ("trainer", "engine")
TURNS, WARM_UP = 5, 1
ROLE = "policy"
THREADS = 1
PROBES, PROBE_TOKENS = 4, 33


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--base", type=Path, help="directory of another base, in place of these")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--payloads", nargs="+", choices=PAYLOADS, default=["adapter", "merged"])
    parser.add_argument("--threads", type=int, default=THREADS)
    args = parser.parse_args()
    whole = (args.base, args.bases, args.payloads, args.threads) == (
        None,
        [*BASES],
        ["adapter", "merged"],
        THREADS,
    )
    execution = Execution("sync" if whole else "sync-some", args.quick)
    names = [str(args.base)] if args.base else ["1m"] if args.quick else args.bases
    found = measure(names, args.payloads, 2 if args.quick else args.turns, args.threads)
    show(found)
    execution.end(ratios_of(found), syncs=found)


def measure(bases: list[str], payloads: list[str], turns: int, threads: int) -> list[dict[str, Any]]:
    """Syncs of all payloads on each base, one after the other in the same two processes."""
    from actors.cluster import LimitsSpec, RoleSpec, start_ray, stop_ray
    from actors.models.tiny import write_tiny_base
    from actors.rollout.remote import ROLLOUT, rollout_group
    from actors.rollout.spec import EngineSpec
    from actors.trainer.remote import host_group

    found: list[dict[str, Any]] = []
    start_ray()
    with tempfile.TemporaryDirectory(prefix="raylign-sync-") as scratch:
        role, limits = RoleSpec(threads=threads), LimitsSpec()
        groups = {}
        # An engine takes versions of its weights or into slots: a trainer and an engine for each.
        for slots in {payload == "lora" for payload in payloads}:
            policy = host_group(f"{ROLE}{'-slots' * slots}", role, limits, scratch).start()
            groups[slots] = policy, rollout_group(role, limits, scratch, f"rollout{'-slots' * slots}").start()
        try:
            for _, rollout in groups.values():
                rollout.ready().build(ROLLOUT, EngineSpec(max_model_len=512)).result()
            for name in bases:
                made = name in BASES
                base = write_tiny_base(Path(scratch) / name, **BASES[name]) if made else Path(name)
                targets = ["attention"] if "lora" in payloads else ["attention", "experts"]
                sides = {slots: Side(base, *both, slots, targets, made) for slots, both in groups.items()}
                found += _syncs(name, base, sides, payloads, turns)
        finally:
            stop_ray()
    return found


class Side:
    """A trainer and an engine, connected, on one base."""

    def __init__(
        self, base: Path, policy: Any, rollout: Any, slots: bool, targets: list[Any], made: bool
    ) -> None:
        """`slots`: the engine takes LoRA in slots; `targets`: of LoRA; `made`: the base is one of `BASES`."""
        from actors.batches import Batch
        from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
        from actors.sync.engine_set import EngineSet
        from actors.sync.spec import SlotSpec, SyncSpec
        from actors.sync.weight_sync import WeightSync
        from actors.trainer.remote import ModelWorkers
        from actors.trainer.spec import HostSpec, OptimSpec

        lora = LoraSpec(
            r=LORA_R, lora_alpha=LORA_ALPHA, targets=targets, expert_rank="r" if made else "r/top_k"
        )
        model = ModelSpec(base=str(base), lora=lora, moe=MoeSpec(router_aux_loss_coef=0.0))
        self.workers = ModelWorkers(policy)
        self.workers.build(HostSpec(model=model)).result()
        self.workers.add_adapter(ROLE)
        optim = OptimSpec(learning_rate=LEARNING_RATE, lr_scheduler_type="constant")
        self.workers.prepare_training(ROLE, optim, 1_000)
        generator = np.random.default_rng(0)
        probes = generator.integers(3, 256, size=(PROBES, PROBE_TOKENS)).tolist()
        self.batch = Batch.from_sequences(probes, [np.arange(PROBE_TOKENS) > 0] * PROBES)
        room = SlotSpec(LORA_R, SLOTS) if slots else None
        spec = SyncSpec(payload="lora") if slots else SyncSpec()
        self.sync = WeightSync(policy, EngineSet(rollout), spec, str(base), ROLE, probes, slots=room)
        self.sync.connect()
        self.pids = {"trainer": policy.pids(), "engine": rollout.pids()}

    def push(self, payload: str, version: int) -> dict[str, Any]:
        """An optimizer step and a sync; what the sync took."""
        from actors.algorithms.sft import SftLoss
        from actors.sync.spec import SyncSpec

        self.workers.update(self.batch, SftLoss(), version).result()
        self.sync.spec = SyncSpec(**PAYLOADS[payload])
        before = {side: cpu_seconds(self.pids[side]) for side in self.pids}
        began = time.perf_counter()
        report = self.sync.push(version)
        seconds = time.perf_counter() - began
        cpu = {side: cpu_seconds(self.pids[side]) - before[side] for side in self.pids}
        return {
            "payload": payload,
            "bytes": report.bytes,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "parts": report.seconds,
            "peak_rss_bytes": {side: peak_rss_bytes(self.pids[side]) for side in self.pids},
        }


def _syncs(
    name: str, base: Path, sides: dict[bool, Side], payloads: list[str], turns: int
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    version = 0
    for turn in range(-WARM_UP, turns):
        for payload in payloads if turn % 2 else reversed(payloads):
            version += 1
            one = sides[payload == "lora"].push(payload, version)
            found.append({"base": name, "turn": turn, "base_bytes": _bytes_of(base), **one})
            if turn >= 0:
                console.print(
                    f"{name} {payload} #{turn + 1}: {one['seconds']:.3f} s, {one['bytes'] / 2**20:,.1f} MiB"
                )
    for side in sides.values():
        side.sync.close()
    return [one for one in found if one["turn"] >= 0]


def _bytes_of(base: Path) -> int:
    return sum(file.stat().st_size for file in base.glob("*.safetensors"))


def show(found: list[dict[str, Any]]) -> None:
    """Medians by base and payload."""
    lines = []
    for name, payload in dict.fromkeys((one["base"], one["payload"]) for one in found):
        same = [one for one in found if (one["base"], one["payload"]) == (name, payload)]
        total, wire = (
            median(one["seconds"] for one in same),
            median(one["parts"]["wire"] for one in same),
        )
        cpu = [median(one["cpu_seconds"][side] for one in same) for side in SIDES]
        lines.append(
            [f"{name} {payload}", same[0]["base_bytes"] / 2**20, same[0]["bytes"] / 2**20, total,
             *[f"{median(one['parts'].get(part, 0.0) for one in same):.3f}" for part in PARTS],
             *map("{:.2f}".format, cpu), total / wire]
        )  # fmt: skip
    rows(
        "One sync, medians: seconds by part, CPU seconds of each side",
        ["base, payload", "base MiB", "MiB sent", "total", *PARTS, *SIDES, "total / wire"],
        lines,
    )
    # One payload alone: what others have held stays in their processes.
    if len({one["payload"] for one in found}) == 1:
        for name in dict.fromkeys(one["base"] for one in found):
            last = [one for one in found if one["base"] == name][-1]["peak_rss_bytes"]
            console.print(
                f"{name}: peak memory " + ", ".join(f"{s} {last[s] / 2**20:,.0f} MiB" for s in SIDES)
            )


def ratios_of(found: list[dict[str, Any]]) -> list[Ratio]:
    """Merged and LoRA in slots over the adapter, in seconds; total over wire time."""
    made = []
    for name in dict.fromkeys(one["base"] for one in found):
        by = {(one["turn"], one["payload"]): one for one in found if one["base"] == name}
        turns = sorted({turn for turn, _ in by})
        payloads = {payload for _, payload in by}
        for payload, what in (("merged", "merged weights"), ("lora", "LoRA in slots")):
            if {"adapter", payload} <= payloads:
                seconds, cpu = (
                    [_of(by[t, payload], of) / _of(by[t, "adapter"], of) for t in turns]
                    for of in ("seconds", "cpu_seconds")
                )
                made.append(Ratio(f"sync of {what} / of the adapter, seconds, {name}", seconds, cpu=cpu))
        if "adapter" in payloads:
            total = [by[t, "adapter"]["seconds"] / by[t, "adapter"]["parts"]["wire"] for t in turns]
            made.append(Ratio(f"adapter sync, total / wire, {name}", total))
    return made


def _of(one: dict[str, Any], what: str) -> float:
    value = one[what]
    return sum(value.values()) if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
