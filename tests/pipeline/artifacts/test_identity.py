"""Decisions on what each stage still needs, from the disk alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from actors.models.spec import LoraSpec, MoeSpec
from pipeline.artifacts.identity import Identity, Length, checkpoints, decide, identity_config
from pipeline.artifacts.manifest import Manifest, new_directory, write_json
from pipeline.stages.context import sound_checkpoint
from tests.pipeline.artifacts.checkpoints import checkpoint_manifest


def identity(**stage: object) -> Identity:
    config = identity_config(
        {"learning_rate": 1e-4, "batch_size": 8, "save_steps": 5, **stage}, {"base": "b"}
    )
    return Identity(config, {"base": "abc"}, "data", 0)


def saved(directory: Path, who: Identity, name: str, step: int | None = None) -> Path:
    with new_directory(directory / name, checkpoint_manifest(who, step)) as aside:
        (aside / "weights").write_text("w")
    return directory / name


def finished(directory: Path, who: Identity, step: int | None = None) -> None:
    saved(directory, who, "adapter", step)
    manifest = Manifest.model_validate_json((directory / "adapter" / "manifest.json").read_text())
    manifest.files = {f"adapter/{name}": entry for name, entry in manifest.files.items()}
    write_json(directory / "manifest.json", manifest.model_dump())


def test_nothing_on_disk_is_new(tmp_path: Path) -> None:
    assert decide(tmp_path / "sft", identity()).state == "new"


def test_a_finished_stage_is_fresh(tmp_path: Path) -> None:
    finished(tmp_path, identity())
    assert decide(tmp_path, identity()).state == "fresh"


def test_a_key_that_does_not_change_the_result_keeps_it_fresh(tmp_path: Path) -> None:
    finished(tmp_path, identity(save_steps=5))
    assert decide(tmp_path, identity(save_steps=50)).state == "fresh"


def test_lora_beside_the_weights_is_another_way_to_compute_and_the_other_payloads_are_not(
    tmp_path: Path,
) -> None:
    finished(tmp_path, identity(sync={"payload": "adapter"}))
    assert decide(tmp_path, identity(sync={"payload": "merged"})).state == "fresh"
    lora = replace(identity(sync={"payload": "lora"}), chosen=frozenset({"stage.payload"}))
    assert decide(tmp_path, lora).changed == ["stage.payload"]


def test_an_answer_of_a_service_does_not_depend_on_how_it_is_asked() -> None:
    service = {"kind": "http", "url": "http://a/", "retries": 5, "max_in_flight": 8, "api_key_env": "KEY"}

    def kept(**more: object) -> dict[str, object]:
        return identity_config({"rewards": [service | more, {"source": "exact_match"}]}, {})

    assert kept(retries=1, max_in_flight=9, api_key_env=None, request_timeout_s=1.0) == kept()
    assert kept(url="http://b/") != kept()


def test_a_changed_key_is_named(tmp_path: Path) -> None:
    finished(tmp_path, identity(learning_rate=1e-4))
    decision = decide(tmp_path, identity(learning_rate=2e-4))
    assert decision.state == "changed"
    assert decision.changed == ["stage.learning_rate"]
    assert "stage.learning_rate" in decision.says


def test_a_changed_input_is_named(tmp_path: Path) -> None:
    finished(tmp_path, identity())
    other = Identity(identity().config, {"base": "xyz"}, "data", 0)
    assert decide(tmp_path, other).changed == ["input base"]


def test_a_finished_stage_with_a_damaged_file_runs_again(tmp_path: Path) -> None:
    finished(tmp_path, identity())
    (tmp_path / "adapter" / "weights").write_text("damaged")
    assert decide(tmp_path, identity()).state == "changed"


def test_a_stage_goes_on_from_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, identity(), "checkpoint-5", 5)
    saved(tmp_path, identity(), "checkpoint-10", 10)
    (tmp_path / "checkpoint-15").mkdir()
    (tmp_path / "checkpoint-15" / "weights").write_text("cut while being written: no manifest")
    decision = decide(tmp_path, identity())
    assert decision.state == "partial"
    assert decision.checkpoint == tmp_path / "checkpoint-10"
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-5"]


def damage(file: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "manifest"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, how: str
) -> None:
    older = saved(tmp_path, identity(), "checkpoint-5", 5)
    newest = saved(tmp_path, identity(), "checkpoint-10", 10)
    weights = newest / "weights"
    {
        "flipped": lambda: damage(weights),
        "cut": lambda: weights.write_bytes(b""),
        "gone": weights.unlink,
        "manifest": lambda: (newest / "manifest.json").write_text('{"type": "check'),
    }[how]()
    decision = decide(tmp_path, identity())
    assert (decision.state, decision.checkpoint) == ("partial", older)
    assert decision.says == "continues from checkpoint-5, since checkpoint-10 is damaged"
    assert str(newest) in decision.damaged["checkpoint-10"]
    assert decision.manifest is not None
    assert sound_checkpoint(older, decision.manifest) == older
    # Set aside: else, as the newest, it would be kept in place of sound ones.
    assert checkpoints(tmp_path) == [older]
    assert (tmp_path / "checkpoint-10.damaged").is_dir()


def test_a_stage_without_a_sound_checkpoint_runs_from_its_start_and_says_so(tmp_path: Path) -> None:
    for step in (5, 10):
        damage(saved(tmp_path, identity(), f"checkpoint-{step}", step) / "weights")
    decision = decide(tmp_path, identity())
    assert (decision.state, decision.checkpoint) == ("changed", None)
    assert decision.says == (
        "runs again from its start: checkpoint-10 and checkpoint-5 are damaged, and no other checkpoint is "
        "there"
    )


@pytest.mark.parametrize(
    "name", ["checkpoint-10-backup", "checkpoint-", "checkpoint-x", "checkpoint-10.damaged", "checkpoint-010"]
)
def test_a_directory_that_is_named_almost_as_a_checkpoint_is_none(tmp_path: Path, name: str) -> None:
    older = saved(tmp_path, identity(), "checkpoint-5", 5)
    saved(tmp_path, identity(), name, 10)
    assert checkpoints(tmp_path) == [older]
    assert decide(tmp_path, identity()).checkpoint == older


def test_a_checkpoint_of_other_settings_is_not_resumed_from(tmp_path: Path) -> None:
    saved(tmp_path, identity(batch_size=8), "checkpoint-5", 5)
    decision = decide(tmp_path, identity(batch_size=16))
    assert decision.state == "changed"
    assert decision.changed == ["stage.batch_size"]


def test_a_stage_from_before_a_key_existed_is_fresh_while_that_is_at_its_default(tmp_path: Path) -> None:
    finished(tmp_path, identity(rewards=[{"source": "a"}]))
    now = identity(rewards=[{"source": "a", "timeout_s": 60.0}], staleness=0)
    decision = decide(tmp_path, now)
    assert decision.state == "fresh"
    # What later stages read of it has the name that they know.
    assert decision.identity is not None
    assert decision.identity.fingerprint == identity(rewards=[{"source": "a"}]).fingerprint
    asked = replace(now, chosen=frozenset({"stage.staleness"}))
    assert decide(tmp_path, asked).changed == ["stage.staleness"]
    other = replace(now, data="others", chosen=frozenset({"stage.rewards.0.timeout_s"}))
    assert decide(tmp_path, other).changed == ["stage.rewards.0.timeout_s", "data"]


@pytest.mark.parametrize("where", ["adapter", "checkpoint-5"])
def test_an_input_may_have_the_fingerprint_that_earlier_versions_gave_it(tmp_path: Path, where: str) -> None:
    earlier = replace(identity(), inputs={"base": "of samples"})
    finished(tmp_path, earlier) if where == "adapter" else saved(tmp_path, earlier, where, 5)
    now = replace(identity(), inputs={"base": "of all"}, earlier_inputs={"base": "of samples"})
    decision = decide(tmp_path, now)
    assert decision.state == ("fresh" if where == "adapter" else "partial")
    assert decision.identity is not None
    assert decision.identity.fingerprint == earlier.fingerprint
    other = replace(now, inputs={"base": "changed"}, earlier_inputs={"base": "changed too"})
    assert decide(tmp_path, other).changed == ["input base"]


def of_length(steps: int, needed_by: str = "") -> Identity:
    return replace(identity(max_steps=steps), length=Length(steps, needed_by))


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_longer_stage_goes_on_where_no_rate_depends_on_its_length(
    tmp_path: Path, is_finished: bool
) -> None:
    saved(tmp_path, of_length(10), "checkpoint-10", 10)
    if is_finished:
        finished(tmp_path, of_length(10), 10)
    decision = decide(tmp_path, of_length(15))
    assert decision.says == "continues from checkpoint-10"
    assert decision.identity == of_length(15)
    # Until it is complete, it is found again, and so is the shorter one.
    saved(tmp_path, of_length(15), "checkpoint-12", 12)
    assert decide(tmp_path, of_length(15)).says == "continues from checkpoint-12"
    shorter = decide(tmp_path, of_length(10))
    assert shorter.says == ("already done, skipped" if is_finished else "runs again: changed stage.max_steps")


def test_a_longer_stage_runs_again_and_says_why_where_rates_depend_on_its_length(tmp_path: Path) -> None:
    saved(tmp_path, of_length(10), "checkpoint-10", 10)
    finished(tmp_path, of_length(10), 10)
    decision = decide(tmp_path, of_length(15, "lr_scheduler_type: linear"))
    assert (decision.state, decision.changed) == ("changed", ["stage.max_steps"])
    assert decision.says == (
        "runs again: changed stage.max_steps (the learning rate of every step depends on it by "
        "lr_scheduler_type: linear)"
    )


def test_a_longer_stage_runs_again_where_something_else_differs_or_no_state_is_left(tmp_path: Path) -> None:
    finished(tmp_path, of_length(10), 10)
    assert decide(tmp_path, of_length(15)).says == (
        "runs again: changed stage.max_steps (no checkpoint to go on from)"
    )
    saved(tmp_path, of_length(10), "checkpoint-10", 10)
    damage(tmp_path / "checkpoint-10" / "weights")
    assert "checkpoint-10 is damaged" in decide(tmp_path, of_length(15)).says
    other = replace(of_length(15), data="others")
    assert decide(tmp_path, other).says == "runs again: changed stage.max_steps, data"
    assert decide(tmp_path, of_length(5)).says == "runs again: changed stage.max_steps"


def test_a_checkpoint_from_before_a_key_existed_is_gone_on_from(tmp_path: Path) -> None:
    saved(tmp_path, identity(), "checkpoint-5", 5)
    decision = decide(tmp_path, identity(staleness=0))
    assert decision.state == "partial"
    assert decision.identity == identity()


def test_a_key_that_is_gone_is_a_change(tmp_path: Path) -> None:
    finished(tmp_path, identity(old_key=1))
    assert decide(tmp_path, identity()).changed == ["stage.old_key"]


@pytest.mark.parametrize("seed", [1])
def test_the_seed_belongs_to_the_identity(tmp_path: Path, seed: int) -> None:
    finished(tmp_path, identity())
    who = identity()
    assert decide(tmp_path, Identity(who.config, who.inputs, who.data, seed)).changed == ["seed"]


BEFORE_UNMERGED = """{
  "type": "checkpoint",
  "stage": "sft",
  "fingerprint": "fb909dbe1646ab9f0cd3fc4fe7fbbd051d64e29a7f135fc0371781f3120a9659",
  "inputs": {"base": "274512b6d5e2b3427239fdeaac9f1770e45aa3571b35b0e5f002ca080aace4d5"},
  "config": {
    "stage": {
      "learning_rate": 0.001, "lr_scheduler_type": "linear", "lr_scheduler_kwargs": {}, "warmup_steps": 0.0,
      "optim": "adamw_torch_fused", "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
      "adam_epsilon": 1e-08, "max_grad_norm": 1.0, "init": null, "batch_size": 32, "num_train_epochs": 3.0,
      "max_steps": 4, "shuffle": true, "max_length": 64, "truncation_mode": "keep_start", "packing": "auto",
      "type": "sft", "train_on": "answer"
    },
    "model": {
      "dtype": "float32", "trust_remote_code": false, "random_init": false,
      "lora": {
        "r": 8, "lora_alpha": 32.0, "lora_dropout": 0.0, "targets": ["attention", "experts"],
        "expert_rank": "r", "expert_impl": "beside", "use_rslora": false
      },
      "moe": {
        "router_aux_loss_coef": null, "experts_implementation": "grouped_mm", "router_replay": "none",
        "router_replay_compare_steps": 10
      }
    }
  },
  "data": {"fingerprint": "1a5fc6d593a58012514ffe7bc89aa898ee998d8cbbddb81ff71bd4e9151e54a2", "rows": 256},
  "seed": 0,
  "step": 2,
  "metrics": {},
  "versions": {"raylign": "0.1.0"},
  "seconds": 0.0,
  "created": "2026-11-30T07:55:28Z",
  "files": {}
}"""
"""As the version that called `unmerged` `beside` wrote it, but for the list of files."""


def now_called_unmerged(**lora: object) -> Identity:
    """The same stage as this version asks for it."""
    old = Manifest.model_validate_json(BEFORE_UNMERGED)
    spec = LoraSpec.model_validate({"r": 8, "expert_impl": "unmerged", **lora})
    model = {
        **old.config["model"],
        "lora": spec.model_dump(mode="json"),
        "moe": MoeSpec().model_dump(mode="json"),
    }
    return Identity({"stage": old.config["stage"], "model": model}, old.inputs, old.data["fingerprint"], 0)


@pytest.mark.parametrize(("where", "state"), [(".", "fresh"), ("checkpoint-2", "partial")])
def test_work_of_before_a_value_was_renamed_is_the_same_work(tmp_path: Path, where: str, state: str) -> None:
    (tmp_path / where).mkdir(exist_ok=True)
    (tmp_path / where / "manifest.json").write_text(BEFORE_UNMERGED)
    decision = decide(tmp_path, now_called_unmerged())
    assert decision.state == state
    # Later stages of that run name it as an input by the fingerprint that it had.
    assert decision.identity is not None
    assert decision.identity.fingerprint.startswith("fb909dbe1646ab9f")
    assert now_called_unmerged().fingerprint != decision.identity.fingerprint


def test_a_change_is_named_alone_where_a_value_was_renamed_too(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(BEFORE_UNMERGED)
    assert decide(tmp_path, now_called_unmerged(r=4)).changed == ["model.lora.r"]
    assert decide(tmp_path, now_called_unmerged(expert_impl="peft")).changed == ["model.lora.expert_impl"]
