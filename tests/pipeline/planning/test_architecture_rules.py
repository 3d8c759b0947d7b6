"""Rules of the table of architectures for a run, and their messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.architectures.vllm_table import VLLM_ROWS
from pipeline.config.run_config import RunConfig
from pipeline.planning.architecture_rules import (
    architecture_problems,
    describe_architecture,
    dry_run_dtype,
)
from tests.actors.models.tiny_models import tiny_config_of

SFT = {"type": "sft", "data": "x"}
GRPO = {"type": "grpo", "data": "x", "rewards": "exact_match"}


def run_of(stages: dict[str, Any], eval: Any = None, **model: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"name": "r", "model": {"base": "some/base", **model}, "stages": stages, "eval": eval}
    )


def problems(model_type: str, stages: dict[str, Any], **model: Any) -> list[str]:
    return architecture_problems(run_of(stages, **model), model_type, stages)


def test_qwen3_next_trains_by_sft_only() -> None:
    stages = {"sft": SFT, "dpo": {"type": "dpo", "data": "x"}, "grpo": GRPO}
    found = problems("qwen3_next", stages, dtype="bfloat16")
    assert [p.split(":")[0] for p in found] == ["stages.dpo.type", "stages.grpo.type"]
    assert "'dpo' can't train a qwen3_next model, only sft: vLLM computes it in bfloat16" in found[0]
    assert problems("qwen3_next", {"sft": SFT}) == []


def test_an_engine_on_the_cpu_needs_a_dtype_that_its_kernels_know() -> None:
    evaluation = {"data": "x", "metric": "exact_match"}
    config = run_of({"sft": SFT}, evaluation)
    (problem,) = architecture_problems(config, "qwen3_next", ["sft"])
    assert "model.dtype: float32, but on the CPU vLLM computes a qwen3_next model in bfloat16 only" in problem
    assert architecture_problems(config, "qwen3_moe", ["sft"]) == []
    config.roles.rollout.gpus = 1
    assert architecture_problems(config, "qwen3_next", ["sft"]) == []


def test_a_base_whose_experts_would_stay_as_they_are_is_not_quantised() -> None:
    for model_type, reason in (("dbrx", "a loop of its own"), ("unheard_of", "is not in the table")):
        (problem,) = problems(model_type, {"sft": SFT}, quantization="nf4")
        assert problem.startswith("model.quantization: nf4, but")
        assert reason in problem
    assert problems("gpt_oss", {"sft": SFT}, quantization="int8") == []


def test_an_architecture_without_a_plan_by_layer_is_not_sharded() -> None:
    roles = {"policy": {"workers": 2, "sharding": "base"}}
    run = run_of({"sft": SFT}).model_dump() | {"roles": roles}
    for model_type, expected in (("dbrx", ["roles.policy.sharding"]), ("qwen3_moe", [])):
        found = architecture_problems(RunConfig.model_validate(run), model_type, ["sft"])
        assert [p.split(":")[0] for p in found] == expected


@pytest.mark.parametrize("model_type", ["qwen3_next", "unheard_of"])
def test_packing_can_not_be_forced_where_sequences_would_mix(model_type: str) -> None:
    (problem,) = problems(model_type, {"sft": {**SFT, "packing": True}})
    assert problem.startswith("stages.sft.packing: true, but a ")
    for packed in ("qwen3_moe", "gpt_oss"):
        assert problems(packed, {"sft": {**SFT, "packing": True}}) == []


def test_attention_with_sinks_packs_by_ours_only() -> None:
    config = run_of({"sft": {**SFT, "packing": True}})
    config.roles.policy.gpus = 1
    assert architecture_problems(config, "gpt_oss", ["sft"]) == []
    config.model.attn_implementation = "flash_attention_2"
    (problem,) = architecture_problems(config, "gpt_oss", ["sft"])
    assert problem.endswith("flash_attention_2; set sdpa there, or packing: auto")
    assert architecture_problems(config, "qwen3_moe", ["sft"]) == []


def test_an_auxiliary_loss_that_the_architecture_lacks_is_refused_before_anything_starts() -> None:
    (problem,) = problems("deepseek_v3", {"sft": SFT}, moe={"router_aux_loss_coef": 0.1})
    assert problem.startswith("model.moe.router_aux_loss_coef: 0.1, but a deepseek_v3 model has no such loss")
    assert problems("gpt_oss", {"sft": SFT}, moe={"router_aux_loss_coef": 0.1}) == []


def test_the_row_is_told_with_its_limits_and_vllms_settings() -> None:
    text = "\n".join(describe_architecture("dbrx"))
    assert "LoRA groups attention; not experts (its experts read each other's weights" in text
    assert "workarounds for 0.32.0: repacked_experts, experts_without_slots, dbrx_expert_names" in text
    text = "\n".join(describe_architecture("qwen3_next"))
    assert "rows are padded; trains by sft only" in text
    assert "vLLM: on the CPU in bfloat16 only" in text
    assert "VLLM_MLA_DISABLE=1" in "\n".join(describe_architecture("deepseek_v2"))
    assert "not in the table" in describe_architecture("unheard_of")[0]


def test_every_architecture_has_both_rows() -> None:
    assert set(ARCHITECTURES) == set(VLLM_ROWS)
    assert all(describe_architecture(name) for name in ARCHITECTURES)


def test_a_dry_run_takes_the_dtype_that_engines_can_compute() -> None:
    assert dry_run_dtype("qwen3_next") == "bfloat16"
    assert dry_run_dtype("gpt_oss") == dry_run_dtype(None) == "float32"


def test_routes_are_replayed_for_families_that_were_seen_to() -> None:
    replay = {"router_replay": "rollout"}
    assert problems("qwen3_moe", {"grpo": GRPO}, moe=replay) == []
    assert problems("glm4_moe", {"grpo": GRPO}, moe=replay) == []
    (problem,) = problems("phimoe", {"grpo": GRPO}, moe=replay)
    assert problem.startswith(
        "model.moe.router_replay: rollout, but the experts of a phimoe model can't be replayed: an expert's "
        "gate depends on which of the two was picked first"
    )


def test_validation_lists_what_the_architecture_forbids_and_says_its_row(tmp_path: Path) -> None:
    from actors.models.tiny import byte_tokenizer
    from pipeline.planning.validate import find

    config = tiny_config_of("qwen3_next")
    config.architectures = ["Qwen3NextForCausalLM"]
    config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    stage = {
        "type": "grpo",
        "data": "builtin:arithmetic",
        "rewards": "exact_match",
        "max_completion_length": 8,
    }
    findings = find(
        run_of({"grpo": {**stage, "max_steps": 2}}, base=str(tmp_path), random_init=True, dtype="bfloat16")
    )
    assert len(findings.problems) == 1, findings.problems
    assert "stages.grpo.type: 'grpo' can't train a qwen3_next model" in findings.problems[0]
    assert findings.architecture == describe_architecture("qwen3_next")
    assert findings.targets is not None


SLOTS = {**GRPO, "sync": {"payload": "lora"}}


def test_lora_that_can_not_be_in_slots_is_refused_with_every_reason() -> None:
    lora = {"r": 600, "targets": ["attention", "experts", "router"]}
    rank, kernel, *unseen = problems("granitemoe", {"grpo": SLOTS}, lora=lora)
    key = "stages.grpo.sync.payload: lora, but "
    assert rank == f"{key}model.lora.r is 600, and a slot has 512; lower it, or set it to adapter"
    assert kernel.startswith(f"{key}vLLM computes experts with LoRA in Triton kernels, which a CPU has not")
    assert unseen == [
        f"{key}LoRA on {group} of a granitemoe model was not seen to be right in slots of vLLM, on attention "
        "was; set it to adapter"
        for group in ("experts", "router")
    ]
    (none,) = problems("dbrx", {"grpo": SLOTS}, lora={"targets": ["attention"]})
    assert none == f"{key}vLLM has no LoRA for a dbrx model; set it to adapter"


def test_experts_have_slots_where_engines_have_gpus() -> None:
    config = run_of({"grpo": SLOTS}, lora={"targets": ["attention", "experts"]})
    (problem,) = architecture_problems(config, "qwen3_moe", ["grpo"])
    assert "Triton" in problem
    config.roles.rollout.gpus = 1
    assert architecture_problems(config, "qwen3_moe", ["grpo"]) == []
    config.roles.rollout.share = "policy"
    assert "not tried in engines that sleep" in architecture_problems(config, "qwen3_moe", ["grpo"])[0]


def test_lora_that_slots_take_is_allowed_and_other_payloads_are_not_asked() -> None:
    lora = {"r": 512, "use_rslora": True, "targets": ["attention", "router"]}
    assert problems("qwen3_moe", {"grpo": SLOTS}, lora=lora) == []
    assert problems("granitemoe", {"grpo": GRPO, "sft": SFT}) == []
    (untried,) = problems("unheard_of", {"grpo": SLOTS}, lora={"targets": ["attention"]})
    assert (
        "LoRA on attention of a unheard_of model was not seen to be right in slots of vLLM, none" in untried
    )
