"""Architectures that the table lacks, through the command line: probed on a real engine before they train."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.whole_runs.runs import command_of, raylign

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}
OF_TYPE: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "glm4_moe_lite": {
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
}


def written_base(path: Path, model_type: str) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    from actors.models.tiny import VOCAB_SIZE, byte_tokenizer

    tokenizer = byte_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {**SIZES, **OF_TYPE[model_type], **ids, "vocab_size": VOCAB_SIZE, "bos_token_id": None}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def raylign_run(tmp_path: Path, model_type: str, **model: Any) -> subprocess.CompletedProcess[str]:
    config = {
        "name": "untested",
        "output_dir": str(tmp_path / "run"),
        "model": {
            "base": str(written_base(tmp_path / "base", model_type)),
            "lora": {"r": 4, "targets": ["attention"]},
            **model,
        },
        "stages": {
            "sft": {
                "data": {"source": "builtin:arithmetic", "split": "train", "max_rows": 16},
                "batch_size": 8,
                "max_steps": 2,
                "max_length": 128,
            }
        },
    }
    command_of(tmp_path, config)
    return raylign("run", str(tmp_path / "run.yaml"))


def test_one_on_which_engine_and_trainer_agree_is_trained(tmp_path: Path) -> None:
    done = raylign_run(tmp_path, "olmo2", allow_untested=True)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 0, said
    assert "probe of an untested architecture: |log-probability difference| in float32" in said
    assert (tmp_path / "run" / "sft" / "adapter" / "adapter_model.safetensors").is_file()


def test_without_leave_it_is_refused_with_the_key_to_set(tmp_path: Path) -> None:
    done = raylign_run(tmp_path, "olmo2")
    assert done.returncode == 2
    assert "architecture 'olmo2' is not supported: it has no tested row" in " ".join(done.stderr.split())
    assert "model.allow_untested: true" in " ".join(done.stderr.split())


def test_one_on_which_they_differ_is_refused_before_anything_trains(tmp_path: Path) -> None:
    done = raylign_run(tmp_path, "glm4_moe_lite", allow_untested=True)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, said
    assert "model.allow_untested: true, but this base can't be used: " in said
    assert not (tmp_path / "run" / "sft" / "adapter").exists()
