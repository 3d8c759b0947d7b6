"""The registry of workarounds and the engine rows that name them. What each does in a real engine, and that
it is still needed, is tested in `sync/test_vllm_architectures.py`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from actors.errors import RunFailure
from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.architectures.vllm_table import UNTESTED, VLLM_ROWS, vllm_row
from actors.rollout.vllm.router_capture import RouteCounter
from actors.rollout.vllm.workarounds.patches import Patches
from actors.rollout.vllm.workarounds.registry import LEANT_ON, WORKAROUNDS, Workaround, source_digest


def test_every_architecture_has_an_engine_row_and_every_row_an_architecture() -> None:
    assert set(VLLM_ROWS) == set(ARCHITECTURES)


def test_rows_name_known_workarounds_and_every_workaround_is_named() -> None:
    named = {name for row in VLLM_ROWS.values() for name in row.workarounds}
    assert named == set(WORKAROUNDS)


def test_every_mixture_of_experts_has_its_experts_repacked() -> None:
    assert {n for n, row in VLLM_ROWS.items() if "repacked_experts" in row.workarounds} == {
        n for n, row in ARCHITECTURES.items() if row.is_moe
    }
    assert vllm_row("no_such_architecture") is UNTESTED


def test_every_workaround_says_where_the_fault_is_and_which_versions_have_it() -> None:
    for workaround in (*WORKAROUNDS.values(), *LEANT_ON.values()):
        assert ".py)" in workaround.cause
        assert workaround.versions
        assert all(":" in path and digest for path, digest in workaround.written_against.items())


def test_config_keys_that_a_checkpoint_has_are_left_alone() -> None:
    row = VLLM_ROWS["minimax_m2"]
    bare = SimpleNamespace(head_dim=32, rope_parameters={"partial_rotary_factor": 0.5})
    assert row.overrides_for(bare) == {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True}
    told = SimpleNamespace(head_dim=32, rotary_dim=8, scoring_func="softmax", use_routing_bias=False)
    assert row.overrides_for(told) == {}
    # What is wrong in any checkpoint is overridden whatever it says.
    named = SimpleNamespace(architectures=["PhimoeForCausalLM"])
    assert VLLM_ROWS["phimoe"].overrides_for(named) == {"architectures": ["PhiMoEForCausalLM"]}


def test_a_workaround_that_does_not_fit_the_installed_code_is_refused_by_name() -> None:
    there = "json:JSONDecoder.decode"
    fitting = Workaround("fits", "it is an example (json.py)", ("0.1",), {there: str(source_digest(there))})
    fitting.check()
    changed = Workaround("old", "it is an example (json.py)", ("0.1",), {there: "0123456789ab"})
    gone = Workaround("gone", "it is an example (json.py)", ("0.1",), {"json:JSONDecoder.no_such": "0"})
    with pytest.raises(
        RunFailure, match=r"workaround 'old' was written for json:JSONDecoder.decode.*0123456"
    ):
        changed.check()
    with pytest.raises(RunFailure, match=r"workaround 'gone' .* has no such code.*it is an example"):
        gone.check()


@pytest.mark.vllm
@pytest.mark.parametrize("name", LEANT_ON)
def test_the_private_code_of_vllm_that_is_leant_on_is_the_code_that_was_read(name: str) -> None:
    LEANT_ON[name].check()


@pytest.mark.vllm
def test_experts_are_not_kept_from_a_runner_that_is_built_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    counter = RouteCounter(nn.Linear(1, 1))
    counter._routers = [SimpleNamespace(top_k=2, global_num_experts=4)]
    monkeypatch.setattr(GPUModelRunner, "_update_states", lambda self, output: None)
    with pytest.raises(RunFailure, match=r"'router_capture' .*_update_states of vLLM 0\.32\.0.*other code"):
        counter.keep(SimpleNamespace())
    assert counter.keeper is None
    monkeypatch.delattr(GPUModelRunner, "_update_states")
    with pytest.raises(RunFailure, match=r"_update_states .*no such code"):
        counter.keep(SimpleNamespace())


def test_patches_are_taken_back_in_the_order_in_which_they_came() -> None:
    class Parent:
        @staticmethod
        def inherited() -> int:
            return 1

    class Child(Parent):
        @staticmethod
        def own() -> int:
            return 2

    patches = Patches()
    patches.set(Child, "own", lambda: 3)
    patches.set(Child, "own", lambda: 4)
    patches.set(Child, "inherited", lambda: 5)
    assert (Child.own(), Child.inherited()) == (4, 5)
    patches.undo()
    assert (Child().own(), Child().inherited()) == (2, 1)
    assert "inherited" not in vars(Child)


def test_a_digest_is_of_one_piece_of_code_and_of_nothing_where_there_is_none() -> None:
    assert source_digest("json:JSONDecoder.decode") != source_digest("json:JSONDecoder.raw_decode")
    assert source_digest("json:no_such_function") is None
    assert source_digest("no_such_module:f") is None
