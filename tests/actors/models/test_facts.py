"""Facts of a base: found by a process that has torch, for a driver without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from actors.models.base.loading import load_tokenizer
from actors.models.facts import base_facts
from actors.models.spec import LoraSpec, ModelSpec

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "assets" / "tiny-moe")


def test_facts_of_a_base_that_may_be_used() -> None:
    facts = base_facts(ModelSpec(base=TINY, lora=LoraSpec(targets=["attention"])))
    assert facts.problems == []
    assert facts.max_positions == 4096
    assert facts.n_experts == 8
    assert facts.lora_targets is not None
    assert "q_proj k_proj v_proj o_proj" in facts.lora_targets


def test_facts_list_what_is_wrong_with_the_targets(tmp_path: Path) -> None:
    facts = base_facts(ModelSpec(base=TINY, lora=LoraSpec(targets=["shared_experts"])))
    assert "shared_experts" in facts.problems[0]
    assert "does not exist" in base_facts(ModelSpec(base=str(tmp_path / "nowhere"))).problems[0]


def test_a_driver_tokenises_without_torch() -> None:
    """torch and what transformers imports with it take 5 CPU seconds, of which the ranks have better use."""
    code = (
        "import sys; from actors.models.base.loading import load_tokenizer\n"
        "from actors.models.spec import ModelSpec\n"
        "import pipeline.execution.fleet, pipeline.planning.read_graph, pipeline.execution.contexts\n"
        "import pipeline.stages.offline.train\n"
        "import pipeline.stages.online.train\n"
        f"assert load_tokenizer(ModelSpec(base={TINY!r}))('12+30=').input_ids\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_light_tokenizer_is_the_one_that_transformers_chooses() -> None:
    from transformers import AutoTokenizer

    light, chosen = load_tokenizer(ModelSpec(base=TINY)), AutoTokenizer.from_pretrained(TINY)
    assert type(light) is type(chosen)
    chat = [{"role": "user", "content": "37+45="}, {"role": "assistant", "content": "82"}]
    assert light.apply_chat_template(chat) == chosen.apply_chat_template(chat)
