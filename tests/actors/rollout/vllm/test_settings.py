"""A process is as it was before an engine started or ended in it."""

from __future__ import annotations

import gc

import pytest

from actors.rollout.vllm.settings import no_collections


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_the_garbage_collector_is_its_own_again_after_an_engine_was_made(fails: bool, enabled: bool) -> None:
    real = gc.collect, gc.freeze, gc.unfreeze
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        try:
            with no_collections():
                assert not gc.isenabled()
                assert not {gc.collect, gc.freeze, gc.unfreeze} & set(real)
                if fails:
                    raise RuntimeError("no model")
        except RuntimeError:
            assert fails
        assert (gc.collect, gc.freeze, gc.unfreeze) == real
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
