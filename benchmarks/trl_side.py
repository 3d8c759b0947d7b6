"""TRL's trainers on PEFT and transformers, at their best settings for a CPU."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.meter import Effort, Meter, Reading, cpu_seconds, peak_rss_bytes
from benchmarks.workloads import BETA, LEARNING_RATE, LORA_ALPHA, LORA_R, Row, Workload, make_rows

Way = Literal["padded", "packed", "inline", "precomputed"]
"""SFT padded or packed; DPO with its reference computed in each step, or ahead of all."""


ALIKE: dict[str, Any] = {
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch_fused",
    "bf16": False,
    # On by default in TRL; it costs a second forward pass.
    "gradient_checkpointing": False,
    # A frozen router gets nothing from it; off on every side.
    "router_aux_loss_coef": 0.0,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1_000_000,
    "disable_tqdm": True,
}
"""Settings of every TRL side: the work that ours does, and nothing beside it."""


@dataclass(frozen=True)
class Settings:
    """What speed depends on."""

    micro_rows: int
    """per_device_train_batch_size; accumulation makes up the optimizer step."""
    by_length: bool = True
    """Rows of similar length in a batch: less padding."""
    bin_length: int = 0
    """max_length of TRL's packing. It lays the bins of a micro-batch end to end into one sequence."""


BEST: dict[tuple[str, Way], Settings] = {
    ("sft-tiny", "padded"): Settings(64),
    ("sft-tiny", "packed"): Settings(1, bin_length=512),
    ("dpo-tiny", "inline"): Settings(32),
    ("dpo-tiny", "precomputed"): Settings(32),
    ("sft-120m", "padded"): Settings(4),
    ("sft-120m", "packed"): Settings(1, bin_length=1024),
    ("dpo-120m", "inline"): Settings(4),
    ("dpo-120m", "precomputed"): Settings(4),
}
"""Found with `python -m benchmarks.offline --tune`."""


class _Clock(TrainerCallback):
    """Starts the meter after the warm-up and ends the training when enough was measured."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.tokens = meter, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokens, self.tokens = self.tokens, 0
        if state.global_step == self.meter.effort.warm_up_steps:
            self.meter.start()
        elif state.global_step > self.meter.effort.warm_up_steps:
            control.should_training_stop = self.meter.step(tokens)


class _Counting:
    """Counts useful tokens, those that are no padding, of each micro-batch."""

    clock: _Clock

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.clock.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]


class Sft(_Counting, SFTTrainer):
    pass


class Dpo(_Counting, DPOTrainer):
    reference_pass: tuple[float, float] = (0.0, 0.0)
    """Wall-clock and CPU seconds of the pass ahead of training."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # rows are tokenised on every side before the clock starts

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        began, cpu = time.perf_counter(), cpu_seconds([os.getpid()])
        made = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_pass = time.perf_counter() - began, cpu_seconds([os.getpid()]) - cpu
        return made


def run(
    workload: Workload, way: Way, base: Path, effort: Effort, threads: int, settings: Settings | None = None
) -> dict[str, Any]:
    """Train until measured. With `precomputed`, `cold` adds the reference pass and `warm` doesn't: TRL keeps
    its result in the data set's cache, too."""
    torch.set_num_threads(threads)
    settings = settings or BEST[workload.name, way]
    clock = _Clock(Meter(effort))
    rows = make_rows(workload, effort.batches * workload.batch_rows, base)
    with tempfile.TemporaryDirectory(prefix="trl-bench-") as scratch:
        make = _sft if workload.objective == "sft" else _dpo
        trainer: Any = make(workload, way, base, settings, rows, scratch, clock)
        trainer.clock = clock
        trainer.train()
    reading = clock.meter.reading
    if workload.objective == "sft":
        readings = {"train": reading}
    elif way == "inline":
        readings = {"cold": reading}
    else:
        seconds, cpu = trainer.reference_pass
        ahead = Reading(sum(row.n_tokens for row in rows), seconds, cpu)
        readings = {"cold": reading.after(ahead), "warm": reading}
    return {"readings": readings, "peak_rss_bytes": peak_rss_bytes([os.getpid()])}


def _sft(
    workload: Workload, way: Way, base: Path, settings: Settings, rows: list[Row], scratch: str, clock: _Clock
) -> SFTTrainer:
    whole = [{"input_ids": r.prompt + r.answers[0], "labels": [-100] * len(r.prompt) + r.answers[0]}
             for r in rows]  # fmt: skip
    packed = way == "packed"
    accumulation = workload.batch_rows // settings.micro_rows
    if packed:
        # As many tokens per optimizer step as on the other sides.
        step_tokens = workload.batch_rows * sum(r.n_tokens for r in rows) / len(rows)
        accumulation = max(1, round(step_tokens / settings.bin_length / settings.micro_rows))
    arguments = SFTConfig(
        **_arguments(settings, scratch, accumulation),
        packing=packed,
        max_length=settings.bin_length if packed else None,
        dataset_kwargs={} if packed else {"skip_prepare_dataset": True},
    )
    return Sft(
        model=_model(base), args=arguments, train_dataset=Dataset.from_list(whole), peft_config=_lora(),
        processing_class=AutoTokenizer.from_pretrained(base), callbacks=[clock],
    )  # fmt: skip


def _dpo(
    workload: Workload, way: Way, base: Path, settings: Settings, rows: list[Row], scratch: str, clock: _Clock
) -> DPOTrainer:
    pairs = [{"prompt_ids": r.prompt, "chosen_ids": r.answers[0], "rejected_ids": r.answers[1],
              "length": len(r.prompt) + max(map(len, r.answers))} for r in rows]  # fmt: skip
    arguments = DPOConfig(
        **_arguments(settings, scratch, workload.batch_rows // settings.micro_rows),
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=way == "precomputed",
        remove_unused_columns=False,
    )
    data = Dataset.from_list(pairs)
    if way == "precomputed":
        # On disk, as a real data set: TRL writes its cache beside it.
        data.save_to_disk(f"{scratch}/pairs")
        data = Dataset.load_from_disk(f"{scratch}/pairs")
    return Dpo(
        model=_model(base), args=arguments, train_dataset=data, peft_config=_lora(),
        processing_class=AutoTokenizer.from_pretrained(base), callbacks=[clock],
    )  # fmt: skip


def _model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, experts_implementation="grouped_mm"
    )


def _lora() -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA_R,
        lora_alpha=LORA_ALPHA,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )


def _arguments(settings: Settings, scratch: str, accumulation: int) -> dict[str, Any]:
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": settings.micro_rows,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "group_by_length" if settings.by_length else "random",
        "max_steps": 1_000_000,  # the clock ends it
        **ALIKE,
    }
