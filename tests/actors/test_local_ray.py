"""A local cluster without the processes that only serve people who look at clusters."""

from __future__ import annotations

from actors.local_ray import EXTRAS, NOT_NEEDED, without_dashboard


def test_rays_own_names_are_still_there() -> None:
    """Renamed ones are left alone, and a local start takes twice as long again."""
    from ray._private import utils
    from ray._private.node import Node

    assert [name for name in NOT_NEEDED if not hasattr(Node, name)] == []
    assert hasattr(utils, EXTRAS)


def test_what_was_changed_is_put_back() -> None:
    from ray._private import utils
    from ray._private.node import Node

    before = [getattr(Node, name) for name in NOT_NEEDED] + [getattr(utils, EXTRAS)]
    with without_dashboard():
        during = [getattr(Node, name) for name in NOT_NEEDED] + [getattr(utils, EXTRAS)]
    assert not set(during) & set(before)
    assert [getattr(Node, name) for name in NOT_NEEDED] + [getattr(utils, EXTRAS)] == before
