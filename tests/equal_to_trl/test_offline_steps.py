"""Loss curves equal TRL's trainers step by step: same adapter, same rows, same order, fp32, 1e-5.

LoRA on attention and experts, packed here and padded there; weights, optimizer and schedule move on
for 12 steps, so a difference anywhere would grow.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.algorithms.dpo import DpoLoss
from actors.algorithms.kto import KtoLoss
from actors.algorithms.reward import RewardLoss
from actors.algorithms.sft import SftLoss
from actors.models.spec import LoraSpec
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import OptimSpec
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.tokens.kto_pairs import with_mismatched
from pipeline.data.tokens.tokenize import TokenizedData, TokenStats
from tests.actors.trainer.host_cases import (
    LORA,
    host_spec,
    pair_batch,
    policy_host,
    random_pairs,
    random_rows,
    sft_batch,
    with_reference,
)

pytestmark = pytest.mark.trl

STEPS, BATCH = 12, 6
OPTIM = OptimSpec(
    learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=0.2, weight_decay=0.01, max_grad_norm=0.5,
    optim="adamw_torch_fused",
)  # fmt: skip
COMMON = ("loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy")
PAIRS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
         "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected")  # fmt: skip


def trl_arguments(directory: Path) -> dict[str, Any]:
    same = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim")
    off = ("bf16", "fp16", "gradient_checkpointing")
    return {
        **{name: getattr(OPTIM, name) for name in same},
        **dict.fromkeys(off, False),
        "output_dir": str(directory),
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "logging_steps": 1,
        "use_cpu": True,
        "max_length": None,
        "router_aux_loss_coef": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def trl_model(base: Path, host: ModelHost, directory: Path) -> Any:
    """Plain PEFT on plain transformers, starting from the host's fresh adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if host.state.spec.model.lora is None:
        return model
    host.saving.save_adapter("policy", directory / "start")
    return PeftModel.from_pretrained(model, directory / "start", is_trainable=True)


def curve(trainer: Any) -> list[dict[str, float]]:
    """TRL's log, one entry a step, rows in order; TRL rounds to 6 digits on the way to the log."""
    from torch.utils.data import SequentialSampler

    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_equal_curves(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], names: tuple[str, ...]
) -> None:
    assert len(ours) == len(theirs) == STEPS
    for step, (mine, trl) in enumerate(zip(ours, theirs, strict=True)):
        for name in names:
            # rewards are differences of sums: measured against the size of the sums
            scale = abs(trl.get("logps/chosen", 0.0)) if name.startswith("rewards") else 0.0
            assert mine[name] == pytest.approx(trl[name], rel=1e-5, abs=1e-6 + 1e-6 * scale), (step, name)


ROUTER = LORA.model_copy(update={"targets": ["attention", "experts", "router"]})


@pytest.mark.parametrize(
    ("lora", "aux"),
    [(LORA, 0.0), (ROUTER, 0.02), (None, 0.0)],
    ids=["lora", "router with auxiliary loss", "every parameter"],
)
def test_sft_equals_trl(lora: LoraSpec | None, aux: float, tiny_base: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = random_rows(STEPS * BATCH)
    host = ModelHost(host_spec(tiny_base, lora=lora, aux=aux))
    role = None if lora is None else "policy"
    if role is not None:
        host.add_adapter(role)
    arguments = {**trl_arguments(tmp_path), "router_aux_loss_coef": aux}
    trainer = SFTTrainer(
        model=trl_model(tiny_base, host, tmp_path),
        args=SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list(
            [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in rows]
        ),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )
    theirs = curve(trainer)
    host.updates.prepare_training(role, OPTIM, STEPS)
    ours = [
        host.updates.update(sft_batch(rows[i * BATCH : (i + 1) * BATCH]), SftLoss(), i) for i in range(STEPS)
    ]
    assert_equal_curves(ours, theirs, (*COMMON, "aux_loss") if aux else COMMON)


VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid+sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "aot": {"loss_type": ["aot"]},
    "ipo and ld_alpha": {"loss_type": ["ipo"], "ld_alpha": 0.4},
    "weighted": {"use_weighting": True},
    "js_divergence": {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid_norm"]},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "loss_type": ["hinge"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.01},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "aot_unpaired, smoothed": {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1},
    **{
        n: {"loss_type": [n]}
        for n in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
    },
}
IN_MAKE_TEST = ("sigmoid", "sigmoid+sft", "aot")


@pytest.mark.parametrize(
    "variant", [v if v in IN_MAKE_TEST else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]
)
def test_dpo_equals_trl(variant: str, tiny_base: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs = random_pairs(STEPS * BATCH)
    host = policy_host(tiny_base)
    settings = VARIANTS[variant]

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    trainer = Tokenised(
        model=trl_model(tiny_base, host, tmp_path),
        args=DPOConfig(**trl_arguments(tmp_path), **settings, remove_unused_columns=False),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )
    theirs = curve(trainer)
    loss = DpoLoss(**settings)
    host.updates.prepare_training("policy", OPTIM, STEPS)
    ours = []
    for step in range(STEPS):
        batch = pair_batch(pairs[step * BATCH : (step + 1) * BATCH])
        ours.append(host.updates.update(with_reference(host, batch, None, loss.ld_alpha), loss, step))
    loss.check_start(ours[0], tolerance=1e-4)
    assert_equal_curves(ours, theirs, (*COMMON, *PAIRS))


KTO_VARIANTS: dict[str, dict[str, Any]] = {
    "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.75, "beta": 0.3},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}
KTO = ("kl", "entropy", "loss", "grad_norm", "learning_rate", "num_tokens")


@pytest.mark.parametrize("variant", ["kto", pytest.param("apo_zero_unpaired", marks=pytest.mark.slow)])
def test_kto_equals_trl(variant: str, tiny_base: Path, tmp_path: Path) -> None:
    """Rows in order: both rotate the answers within each batch."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    rows = random_rows(STEPS * BATCH)
    # the third batch has desirable rows only
    labels = np.array([i % 3 != 0 or i // BATCH == 2 for i in range(len(rows))])
    host = policy_host(tiny_base)
    settings = KTO_VARIANTS[variant]
    kl = settings.get("loss_type") is None

    class Tokenised(KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    def rotated(i: int) -> list[int]:
        start = i // BATCH * BATCH
        return rows[start + (i - start - 1) % BATCH][1]

    theirs = curve(
        Tokenised(
            model=trl_model(tiny_base, host, tmp_path),
            args=KTOConfig(**trl_arguments(tmp_path), **settings, remove_unused_columns=False),
            train_dataset=Dataset.from_list(
                [
                    {"prompt_ids": p, "completion_ids": a, "label": bool(labels[i])}
                    | ({"KL_completion_ids": rotated(i)} if kl else {})
                    for i, (p, a) in enumerate(rows)
                ]
            ),
            processing_class=AutoTokenizer.from_pretrained(tiny_base),
        )
    )
    whole = replace(sft_batch(rows), columns={"label": labels})
    stats = TokenStats(len(rows), 0, 0, 0, 0, 0, 0)
    data = TokenizedData(whole, np.arange(len(rows)), Skipped(), stats)
    batches = [np.arange(i, i + BATCH) for i in range(0, len(rows), BATCH)]
    if kl:
        data = with_mismatched(data, batches, None)
    loss = KtoLoss(**settings)
    host.updates.prepare_training("policy", OPTIM, STEPS)
    ours = []
    for step, numbers in enumerate(batches):
        batch = data.batch(numbers)
        logps = host.scores.logprobs(batch, None).reshape(BATCH, -1)
        names = ("ref_logps", "ref_kl_logps")[: logps.shape[1]]
        batch = batch.with_columns(**{name: logps[:, place] for place, name in enumerate(names)})
        ours.append(host.updates.update(batch, loss, step))
    assert "rewards/rejected" not in theirs[2]
    assert "rewards/rejected" not in ours[2]
    assert not kl or max(step["kl"] for step in theirs) > 0
    for step, (mine, trl) in enumerate(zip(ours, theirs, strict=True)):
        names = (*KTO, *(name for name in trl if name.startswith(("rewards/", "logps/", "logits/"))))
        for name in names:
            scale = abs(trl.get("logps/chosen", 0.0)) if name.startswith(("rewards", "kl")) else 0.0
            assert mine[name] == pytest.approx(trl[name], rel=1e-5, abs=1e-6 + 1e-6 * scale), (step, name)


SCORES = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")
REWARD_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "centered, with margins": {"center_rewards_coefficient": 0.05},
}


@pytest.mark.parametrize("variant", REWARD_VARIANTS)
def test_reward_equals_trl(variant: str, tiny_base: Path, tmp_path: Path) -> None:
    """From the same head: TRL starts from the saved adapter, which holds it."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    settings = REWARD_VARIANTS[variant]
    pairs = random_pairs(STEPS * BATCH)
    margins = np.random.default_rng(0).uniform(0, 1, len(pairs)) if settings else None
    host = ModelHost(host_spec(tiny_base, max_tokens_per_micro_batch=200))
    host.add_adapter("policy")
    host.add_head("policy", "normal")
    host.saving.save_adapter("policy", tmp_path / "start")
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path / "start", is_trainable=True)
    rows = [
        {
            "chosen_ids": pair["prompt_ids"] + pair["chosen_ids"],
            "rejected_ids": pair["prompt_ids"] + pair["rejected_ids"],
            **({} if margins is None else {"margin": margins[i]}),
        }
        for i, pair in enumerate(pairs)
    ]
    # TRL has no auxiliary loss here.
    arguments = {k: v for k, v in trl_arguments(tmp_path).items() if k != "router_aux_loss_coef"}
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**arguments, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )
    theirs = curve(trainer)
    host.updates.prepare_training("policy", OPTIM, STEPS)
    ours = []
    for step in range(STEPS):
        part = slice(step * BATCH, (step + 1) * BATCH)
        batch = pair_batch(pairs[part], **({} if margins is None else {"margin": margins[part]}))
        ours.append(host.updates.update(batch, RewardLoss(**settings), step))
    assert_equal_curves(ours, theirs, ("loss", "grad_norm", "learning_rate", "num_tokens", *SCORES))
