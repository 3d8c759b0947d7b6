"""Plans of memory and time: sizes of bases, bytes by what they are for, what would make a run fit."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from actors.models.facts import BaseSizes, base_sizes
from actors.models.spec import LoraSpec
from pipeline.cli.app import main
from pipeline.config.load import load_config, validate
from pipeline.config.run_config import RunConfig
from pipeline.planning import planned
from pipeline.planning.costs.changes import changed, overfull, ways_to_fit
from pipeline.planning.costs.devices import GPUS, cpu
from pipeline.planning.costs.nodes_of import laid_out
from pipeline.planning.costs.processes import Budget, ProcessMemory
from pipeline.planning.costs.run_plan import RunPlan
from tests.actors.models.tiny_models import SIZES, tiny_model
from tests.pipeline.planning.costs.published import PUBLISHED, config_json, write

GIB = 2**30
QWEN, MIXTRAL, GPT_OSS, OLMOE = PUBLISHED
SFT = {"sft": {"data": "x"}}


@pytest.fixture(scope="module")
def published() -> dict[str, BaseSizes]:
    """Sizes of the bases of the configs for GPUs."""
    from transformers import AutoConfig

    found = {}
    for name, values in PUBLISHED.items():
        settings = dict(values)
        found[name] = base_sizes(AutoConfig.for_model(settings.pop("model_type"), **settings))
    return found


def config(stages: dict[str, Any], **sections: Any) -> RunConfig:
    data = {"name": "a", "model": {"base": "some/base"}, "stages": stages, **sections}
    loaded, problems = validate(data)
    assert loaded is not None, problems
    return loaded


def processes(run: RunConfig, sizes: BaseSizes, device: str = "h100-80") -> dict[str, ProcessMemory]:
    return {f"{p.stage}: {p.name}": p for p in Budget(run, sizes, GPUS[device], {}).processes()}


def test_published_bases_have_the_parameters_that_they_are_known_for(published: dict[str, BaseSizes]) -> None:
    billions = {name: round(sizes.elements / 1e9, 1) for name, sizes in published.items()}
    assert billions == {QWEN: 30.5, MIXTRAL: 46.7, GPT_OSS: 20.9, OLMOE: 6.9}
    # 1.3 B by its authors, who count the embedding too (arXiv 2409.02060).
    olmoe = published[OLMOE]
    assert (olmoe.active_elements() + 2 * olmoe.head_elements) / 1e9 == pytest.approx(1.28, abs=0.02)


def test_an_adapter_is_as_large_as_its_targets_on_every_architecture() -> None:
    from actors.models.lora.targets import resolve_targets

    for model_type in SIZES:
        net = tiny_model(model_type)
        sizes = base_sizes(net.config, net)
        lora = LoraSpec(r=8, targets=["attention"])
        assert sizes.elements == sum(p.numel() for p in net.parameters()), model_type
        assert sizes.adapter_elements(lora) == resolve_targets(net, lora.targets, lora).parameters, model_type


def test_layers_know_the_widths_of_their_mlps(published: dict[str, BaseSizes]) -> None:
    assert [published[name].layers[0].width("experts") for name in PUBLISHED] == [768, 14336, 2880, 1024]
    assert published[QWEN].layers[0].norms == 2
    assert published[QWEN].layers[0].head_norms
    assert not published[MIXTRAL].layers[0].head_norms


def test_what_ranks_hold_follows_from_what_they_split(published: dict[str, BaseSizes]) -> None:
    bf16 = {"base": "b", "dtype": "bfloat16"}
    whole = 2 * published[QWEN].elements

    def base_of(**role: Any) -> float:
        roles = {"policy": {"workers": 4, "gpus": 1, **role}}
        return processes(config(SFT, model=bf16, roles=roles), published[QWEN])["sft: policy 0-3"].parts[
            "base"
        ]

    assert base_of() == whole
    assert base_of(sharding="base") == whole // 4
    stacked = sum(w.elements for w in published[QWEN].weights if w.part == "experts") * 2
    assert base_of(sharding="experts") == whole - stacked + stacked // 4
    layers = sum(w.elements for layer in published[QWEN].layers for w in layer.weights) * 2
    assert whole - layers < base_of(tensor_parallel_size=2) < whole - 0.49 * layers


def test_adapters_of_all_stages_are_kept_and_only_what_trains_has_moments(
    published: dict[str, BaseSizes],
) -> None:
    lora = {"r": 16, "targets": ["attention"]}
    stages = {"sft": {"data": "x"}, "dpo": {"data": "x"}}
    run = config(
        stages, model={"base": "b", "dtype": "bfloat16", "lora": lora}, roles={"policy": {"gpus": 1}}
    )
    found = processes(run, published[OLMOE])
    one = 4 * published[OLMOE].adapter_elements(LoraSpec(**lora))
    assert found["sft: policy 0"].parts["adapters"] == one
    assert found["dpo: policy 0"].parts["adapters"] == 2 * one
    assert found["dpo: policy 0"].parts["gradients"] == one
    assert found["dpo: policy 0"].parts["moments"] == 2 * one
    freed = changed(run, "stages.sft.keep_warm", False)
    # What the DPO starts from and its own.
    assert processes(freed, published[OLMOE])["dpo: policy 0"].parts["adapters"] == 2 * one


def test_without_lora_every_weight_has_a_gradient_and_moments_in_its_dtype(
    published: dict[str, BaseSizes],
) -> None:
    full = {"base": "b", "dtype": "bfloat16", "lora": None}
    parts = processes(config(SFT, model=full, roles={"policy": {"gpus": 1}}), published[OLMOE])[
        "sft: policy 0"
    ].parts
    assert parts["gradients"] == parts["base"] == 2 * published[OLMOE].elements
    assert parts["moments"] == 2 * parts["base"]
    assert "adapters" not in parts


def test_a_base_in_4_bits_is_as_large_as_its_files_say(published: dict[str, BaseSizes]) -> None:
    from transformers import AutoConfig

    from actors.models.quantization.layout import quantised_sizes

    base, model = AutoConfig.for_model(**PUBLISHED[OLMOE]), {"base": "b", "dtype": "bfloat16"}
    sizes = base_sizes(base, quantization="nf4")
    run = config(SFT, model={**model, "quantization": "nf4"}, roles={"policy": {"gpus": 1}})
    known = quantised_sizes(base, "nf4", torch.bfloat16)
    small = processes(run, sizes)["sft: policy 0"].parts["base"]
    assert small == known.weights_bytes + known.others_bytes
    assert small < 0.7 * sizes.elements
    whole = config(SFT, model=model, roles={"policy": {"gpus": 1}})
    assert processes(whole, sizes)["sft: policy 0"].parts["base"] == 2 * sizes.elements


def test_checkpointing_keeps_a_row_of_states_for_each_layer(published: dict[str, BaseSizes]) -> None:
    def parts(again: bool) -> dict[str, int]:
        model = {"base": "b", "dtype": "bfloat16", "gradient_checkpointing": again}
        run = config(SFT, model=model, roles={"policy": {"gpus": 1}})
        return processes(run, published[OLMOE])["sft: policy 0"].parts

    again, kept = parts(True), parts(False)
    tokens, hidden = 8 * 1024, 2048
    assert again["activations"] == tokens * hidden * 2 * 16 + tokens * hidden * 4 + (tokens - 8) * hidden * 2
    assert kept["activations"] > 8 * again["activations"]
    assert "one layer again" not in kept


def test_an_engine_on_a_gpu_fills_with_its_cache_what_its_weights_leave(
    published: dict[str, BaseSizes],
) -> None:
    roles = {
        "policy": {"gpus": 1},
        "rollout": {"gpus": 1, "engine": {"max_model_len": 2048, "gpu_memory_utilization": 0.92}},
    }
    online = {"grpo": {"data": "x", "rewards": "exact_match"}}
    run = config(online, model={"base": "b", "dtype": "bfloat16"}, roles=roles)
    engine = processes(run, published[QWEN])["grpo: rollout 0"]
    assert engine.parts["weights"] == 2 * published[QWEN].elements
    # 2 x 48 layers x 4 heads x 128 x 2 bytes = 96 KiB a token.
    cache = engine.parts["cache"] + engine.parts["one sequence's cache"]
    tokens = cache // (96 * 1024)
    assert engine.notes == (f"cache of {tokens:,} tokens, {tokens // 2048} whole sequences",)
    small = processes(run, published[MIXTRAL])["grpo: rollout 0"]
    assert small.notes == ("no room for the cache of one sequence of 2,048 tokens",)
    assert small.total > small.room


@pytest.mark.parametrize(("positions", "gib"), [(64, 1), (512, 4), (4096, 4)])
def test_the_cache_of_an_engine_on_the_cpu_has_64_sequences_within_4_gib(
    published: dict[str, BaseSizes], positions: int, gib: int
) -> None:
    run = config({"grpo": {"data": "x", "rewards": "exact_match"}}, model={"base": "b"})
    run = changed(run, "roles.rollout.engine.max_model_len", positions)
    found = Budget(run, published[OLMOE], cpu(64 * GIB), {}).processes()
    engine = next(p for p in found if p.role == "rollout")
    # 2 x 16 layers x 2048 x 4 bytes = 256 KiB a token.
    assert engine.parts["one sequence's cache"] == positions * 256 * 1024
    assert engine.parts.get("cache", 0) + engine.parts["one sequence's cache"] == gib * GIB


def test_what_does_not_fit_fits_with_each_of_the_changes_that_are_named(
    published: dict[str, BaseSizes],
) -> None:
    bf16 = {"base": "b", "dtype": "bfloat16"}
    roles = {"policy": {"workers": 4, "gpus": 1}}
    sft = {"sft": {"data": "x", "max_tokens_per_micro_batch": 4096}}
    budget = Budget(config(sft, model=bf16, roles=roles), published[QWEN], GPUS["h100-80"], {})
    assert {p.name for p in overfull(budget)} == {"policy 0-3"}
    ways = ways_to_fit(budget)
    assert ways
    for way in ways:
        run = budget.config
        for key, value in way:
            run = changed(run, key, value)
        assert not overfull(Budget(run, published[QWEN], GPUS["h100-80"], {})), way
    assert (("model.gradient_checkpointing", True),) in ways
    # What fits needs no change.
    small = Budget(config(SFT, model=bf16, roles=roles), published[OLMOE], GPUS["h200"], {})
    assert not overfull(small)


def test_processes_fill_nodes_of_eight_gpus() -> None:
    roles = {"policy": {"workers": 6, "gpus": 1}, "rollout": {"workers": 4, "gpus": 1}}
    online = {"grpo": {"data": "x", "rewards": "exact_match"}}
    nodes = laid_out(config(online, roles=roles), GPUS["h200"])
    assert [node.processes for node in nodes] == [{"policy": 6, "rollout": 2}, {"rollout": 2}]
    roles["rollout"]["placement"] = "strict_pack"  # type: ignore[assignment]
    nodes = laid_out(config(online, roles=roles), GPUS["h200"])
    assert [node.processes for node in nodes] == [{"rollout": 4, "policy": 4}, {"policy": 2}]


def test_a_longer_step_takes_longer_and_a_faster_card_less(published: dict[str, BaseSizes]) -> None:
    bf16 = {"base": "b", "dtype": "bfloat16"}
    run = config({"sft": {"data": "x", "max_length": 1024}}, model=bf16, roles={"policy": {"gpus": 1}})

    def seconds(one: RunConfig, gpu: str) -> float:
        return RunPlan.of(one, published[OLMOE], GPUS[gpu]).steps[0].seconds

    assert seconds(run, "h100-80") < seconds(run, "a100-80")
    assert seconds(run, "h200") < seconds(changed(run, "stages.sft.batch_size", 64), "h200")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the config.json of a mixture and no weights, and a run of it."""
    base = write(OLMOE, tmp_path / "base")
    run = {"name": "big", "model": {"base": str(base)}, "stages": {"sft": {"data": "builtin:arithmetic"}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run.yaml"


def test_a_plan_needs_a_config_json_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(here), "roles.policy.gpus=1", "model.dtype=bfloat16", "--gpu", "h200"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "6.92 B parameters" in said
    assert "sft policy 0" in said
    assert "planned memory on h200: policy 0 in sft takes" in said
    assert re.search(r"temporary files \(TMPDIR\): 0.5 GiB while a stage starts", said)
    assert main(["plan", str(here), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 6_919_161_856
    (process,) = found["processes"]
    assert process["bytes"] == sum(process["parts"].values())
    assert math.isclose(found["steps"][0]["seconds"], sum(found["steps"][0]["parts"].values()))
    storage = found["storage"]
    assert storage["temporary"] == storage["results"], "one adapter, of one rank and of one stage"
    assert storage["merged_copies"] == 4 * found["parameters"], "float32, one engine"


def test_a_judges_engines_are_planned_with_the_sizes_of_its_own_model(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(QWEN, here.parent / "judge")
    reward = {"kind": "judge", "model": "judge", "prompt": "judge.txt"}
    stage = {"data": "builtin:arithmetic", "rewards": [reward]}
    here.write_text(yaml.safe_dump(yaml.safe_load(here.read_text()) | {"stages": {"grpo": stage}}))
    assert main(["plan", str(here), "model.dtype=bfloat16", "--json"]) == 0
    weights = {p["role"]: p["parts"].get("weights") for p in json.loads(capsys.readouterr().out)["processes"]}
    assert weights["rollout"] == 2 * 6_919_161_856
    assert weights["judge"] == pytest.approx(2 * 30.5e9, rel=0.01)
    assert main(["plan", str(here), "stages.grpo.rewards.0.model=elsewhere/at/all"]) == 2
    assert "elsewhere/at/all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--gpu", "h1000"],
            "--gpu h1000: no rates are known of it; one of h100-80, h200, a100-80, l40s, cpu",
        ),
        (["--gpu", "h200"], "--gpu h200: no role of this run has GPUs"),
        (["--gpu", "cpu", "roles.policy.gpus=1"], "--gpu cpu: roles of this run have GPUs"),
        (["model.base=nowhere/at/all"], "model.base"),
    ],
)
def test_what_can_not_be_planned_is_said_with_exit_code_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["plan", str(here), *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_run_beyond_this_machine_is_refused_with_its_largest_parts_and_a_way(
    published: dict[str, BaseSizes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "local_memory", lambda: 16 * GIB)
    run = config(SFT)
    (problem,) = planned.memory_problems(run, published[OLMOE], ["sft"], True)
    assert problem.startswith("limits.memory: stage sft takes at least ")
    assert "25.8 GiB base of policy 0" in problem
    assert "this machine has 16.0 GiB" in problem
    assert "set ignore" in problem
    assert not planned.memory_problems(run, published[OLMOE], [], True)
    assert not planned.memory_problems(run, None, ["sft"], True)
    assert not planned.memory_problems(run, published[OLMOE], ["sft"], local=False)
    for key, value in (("limits.memory", "ignore"), ("roles.policy.gpus", 1.0)):
        assert not planned.memory_problems(changed(run, key, value), published[OLMOE], ["sft"], True), key
    monkeypatch.setattr(planned, "local_memory", lambda: 32 * GIB)
    assert not planned.memory_problems(run, published[OLMOE], ["sft"], True), (
        "activations of rows don't count"
    )


SMALL_MACHINE = """
import sys
from pipeline.cli.app import main
from pipeline.planning import planned
planned.local_memory = lambda: 2**20
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.ray
def test_a_run_is_refused_before_a_base_is_loaded(tiny_base: Path, tmp_path: Path) -> None:
    """In processes of their own: where Ray is connected already, a run is none of this machine's alone."""
    data = {"source": "builtin:arithmetic", "split": "train", "max_rows": 64}
    stages = {"sft": {"data": data, "max_steps": 1}}
    run = {"name": "big", "output_dir": str(tmp_path / "out"), "model": {"base": str(tiny_base)}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run, "stages": stages}))
    for verb in ("validate", "run"):
        command = [sys.executable, "-c", SMALL_MACHINE, verb, str(tmp_path / "run.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2, done.stderr
        assert "limits.memory: stage sft takes at least" in " ".join(done.stderr.split()), verb
    assert not (tmp_path / "out" / "sft").exists()


def test_comments_of_the_gpu_configs_are_their_plans(
    published: dict[str, BaseSizes], repository: Path
) -> None:
    from transformers import AutoConfig

    for path in sorted((repository / "configs").glob("*.yaml")):
        text = path.read_text()
        run = load_config(path)
        if not any(run.roles.of(role).gpus for role in ("policy", "rollout")):
            continue
        name = next(one for one, values in PUBLISHED.items() if values is config_json(run.model.base))
        gpu = "h200" if "141 GB" in text else "h100-80"
        comment = " ".join(line.lstrip("# ") for line in text.split("name:")[0].splitlines())
        sizes = published[name]
        if run.model.quantization is not None:
            sizes = base_sizes(AutoConfig.for_model(**PUBLISHED[name]), quantization=run.model.quantization)
        assert RunPlan.of(run, sizes, GPUS[gpu]).sentences() in comment, path.name
