"""A real vLLM engine in a real Ray actor: what it generates is what transformers says it should."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup
from actors.errors import RunFailure, UserError
from actors.rollout.engine import EngineSpec, Generations, SamplingSpec, sample_seed
from actors.rollout.remote import ROLLOUT, rollout_group

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

PROMPTS = [[5, 60, 70], [9, 9, 9, 40, 41, 42, 43], [100, 101], [7] * 30]
GREEDY = SamplingSpec(temperature=0, max_tokens=12)
WARM = SamplingSpec(temperature=0.7, max_tokens=12, n=2)


@pytest.fixture(scope="module")
def engine(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroup]:
    """One engine for all tests of this file."""
    group = rollout_group(RoleSpec(), LimitsSpec(stop=5), tmp_path_factory.mktemp("rollout") / "logs")
    group.start().ready().build(ROLLOUT, EngineSpec(max_num_seqs=64)).result()
    yield group
    group.shutdown()


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on attention and experts whose B is not zero, so that merging it changes everything."""
    import torch

    from actors.models.base.loading import load_base
    from actors.models.lora.adapters import attach_lora, save_adapter
    from actors.models.spec import LoraSpec, ModelSpec

    peft = attach_lora(load_base(ModelSpec(base=str(tiny_base)), "cpu"), LoraSpec(r=4), "default", 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(peft, "default", path)
    return path


def generate(
    engine: WorkerGroup, sampling: SamplingSpec, prompts: Any = PROMPTS, seeds: Any = None
) -> Generations:
    result: Generations = engine.call_rank(0, "generate", prompts, sampling, seeds, phase="generate")
    return result


def load(engine: WorkerGroup, *what: Any) -> None:
    engine.call_rank(0, "load", *map(str, what), phase="load")


def tokens(made: Generations) -> list[list[int]]:
    return [ids.tolist() for ids in made.sequences()]


def expected_logprobs(
    model: Any, prompts: list[list[int]], made: Generations, temperature: float
) -> np.ndarray:
    """transformers' log-probability of every generated token, float32."""
    import torch

    values = []
    for i, ids in enumerate(made.sequences()):
        prompt = prompts[i // made.n]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids.tolist()]])).logits[0, len(prompt) - 1 : -1]
        logps = (logits / temperature).log_softmax(-1)
        values.append(logps.gather(1, torch.tensor(ids.tolist())[:, None])[:, 0].numpy())
    return np.concatenate(values)


def test_log_probabilities_equal_transformers_after_temperature(engine: WorkerGroup, tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    load(engine, tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="float32")
    for sampling in (GREEDY, WARM):
        made = generate(engine, sampling)
        # Greedy has no temperature: its log-probabilities are the model's own.
        expected = expected_logprobs(model, PROMPTS, made, sampling.temperature or 1.0)
        np.testing.assert_allclose(made.logprobs, expected, atol=1e-5)


def test_greedy_tokens_are_the_most_probable_ones(engine: WorkerGroup, tiny_base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    load(engine, tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="float32")
    for prompt, ids in zip(PROMPTS, tokens(generate(engine, GREEDY)), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == ids


def test_an_adapter_is_merged_and_its_engine_equals_peft(
    engine: WorkerGroup, tiny_base: Path, adapter: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    load(engine, tiny_base, adapter, "sft")
    made = generate(engine, WARM)
    assert made.label == "sft"
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="float32")
    unchanged = expected_logprobs(base, PROMPTS, made, 0.7)
    assert np.abs(made.logprobs - unchanged).max() > 0.01
    expected = expected_logprobs(PeftModel.from_pretrained(base, adapter), PROMPTS, made, 0.7)
    np.testing.assert_allclose(made.logprobs, expected, atol=2e-5)


def test_models_can_be_changed_back_and_forth_in_one_process(
    engine: WorkerGroup, tiny_base: Path, adapter: Path
) -> None:
    load(engine, tiny_base)
    first = generate(engine, WARM)
    load(engine, tiny_base, adapter)
    other = generate(engine, WARM)
    load(engine, tiny_base)
    again = generate(engine, WARM)
    assert tokens(first) == tokens(again)
    np.testing.assert_array_equal(first.logprobs, again.logprobs)
    assert tokens(first) != tokens(other)


def test_an_adapter_directory_stands_for_a_model(engine: WorkerGroup, tiny_base: Path, adapter: Path) -> None:
    load(engine, tiny_base, adapter)
    named = generate(engine, WARM)
    load(engine, adapter)
    assert tokens(generate(engine, WARM)) == tokens(named)


def test_a_seed_draws_the_same_sample_in_any_company(engine: WorkerGroup, tiny_base: Path) -> None:
    load(engine, tiny_base)
    sampling = SamplingSpec(temperature=1, max_tokens=12)
    seeds = [sample_seed(3, 0, p, 0) for p in range(len(PROMPTS))]
    together = tokens(generate(engine, sampling, seeds=seeds))
    backwards = tokens(generate(engine, sampling, PROMPTS[::-1], seeds[::-1]))
    assert backwards[::-1] == together
    assert tokens(generate(engine, sampling, PROMPTS[2:3], seeds[2:3])) == together[2:3]
    assert tokens(generate(engine, sampling, seeds=[s + 1 for s in seeds])) != together


def test_samples_of_one_prompt_differ_and_come_prompt_by_prompt(engine: WorkerGroup, tiny_base: Path) -> None:
    load(engine, tiny_base)
    made = generate(engine, SamplingSpec(temperature=1, max_tokens=8, n=3), PROMPTS[:2])
    assert len(made.finish) == 6
    assert len({tuple(ids) for ids in tokens(made)[:3]}) == 3


def test_more_seeded_prompts_than_one_step_can_prefill(engine: WorkerGroup, tiny_base: Path) -> None:
    load(engine, tiny_base)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(5, 250, size=300).tolist() for _ in range(70)]
    made = generate(engine, SamplingSpec(temperature=1, max_tokens=2), prompts)
    assert len(made.finish) == 70


def test_samples_end_at_the_token_limit_or_at_a_stop_string(engine: WorkerGroup, tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    load(engine, tiny_base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    free = generate(engine, GREEDY, PROMPTS[:1])
    assert free.finish_reasons in (["length"], ["stop"])
    text = free.texts(tokenizer)[0]
    stop = next(character for character in text if character.isprintable())
    stopped = generate(engine, GREEDY.model_copy(update={"stop": [stop]}), PROMPTS[:1])
    assert stopped.finish_reasons == ["stop"]
    assert stopped.texts(tokenizer, [stop]) == [text.split(stop)[0]]


def test_no_prompts_are_no_error(engine: WorkerGroup, tiny_base: Path) -> None:
    load(engine, tiny_base)
    assert len(generate(engine, GREEDY, []).finish) == 0


def test_prompts_that_fill_the_model_are_refused_with_the_first_of_them(
    engine: WorkerGroup, tiny_base: Path
) -> None:
    load(engine, tiny_base)
    with pytest.raises(
        UserError, match=r"1 of 2 prompts leave no room .*the first: prompt 1 with 9000 tokens"
    ):
        generate(engine, GREEDY, [[5], [5] * 9000])


def test_a_model_that_is_not_there_is_the_users_mistake(engine: WorkerGroup) -> None:
    with pytest.raises(
        UserError, match="/no/such/model: the rollout engine can't read this model: no such directory"
    ):
        load(engine, "/no/such/model")


def test_generating_without_a_model_says_so(engine: WorkerGroup) -> None:
    engine.call_rank(0, "unload")
    with pytest.raises(RunFailure, match="no model is loaded"):
        generate(engine, GREEDY)


def test_an_engine_killed_while_generating_is_named_and_its_successor_draws_the_same(
    engine: WorkerGroup, tiny_base: Path
) -> None:
    load(engine, tiny_base)
    expected = tokens(generate(engine, WARM))
    pid = engine.pids()[0]
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(RunFailure) as caught:
        generate(engine, SamplingSpec(temperature=1, max_tokens=500, n=64))
    assert time.monotonic() - began < 20
    assert (caught.value.who, caught.value.phase) == ("rollout-0", "generate")
    engine.restart(0)
    engine.ready().build(ROLLOUT, EngineSpec(max_num_seqs=64)).result()
    load(engine, tiny_base)
    assert tokens(generate(engine, WARM)) == expected
