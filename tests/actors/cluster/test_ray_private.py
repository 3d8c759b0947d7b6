"""A Ray that lacks one of the private names in use is met with a way round it, or with what to do."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray._private import services, worker
from ray._private.authentication import authentication_token_setup as tokens

from actors.cluster import ray_private
from actors.cluster.connection import start_ray, stop_ray
from actors.cluster.futures import Fault
from actors.cluster.ray_private import TRIED, head_address, mute_raylet, private, unmute_raylet, use_token
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup
from actors.errors import UserError


def test_the_installed_ray_has_every_name() -> None:
    assert ray.__version__.startswith(TRIED)
    assert private("ray._private.services", "canonicalize_bootstrap_address") is not None
    assert private("ray._private.worker", "print_to_stdstream") is not None
    assert private(ray_private._TOKENS, ray_private._USE_TOKEN) is not None


def test_a_name_or_a_module_that_is_missing_is_none() -> None:
    assert private("ray._private.services", "no_such_function") is None
    assert private("ray._private.no_such_module", "anything") is None


def test_an_address_is_used_as_it_stands_where_ray_cannot_complete_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(services, "canonicalize_bootstrap_address")
    assert head_address("10.0.0.1:6379") == "10.0.0.1:6379"
    for neither in ("somewhere", ":6379", "host:port"):
        with pytest.raises(ValueError, match=r"host|invalid literal"):
            head_address(neither)


def test_auto_is_refused_where_ray_cannot_look_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(services, "canonicalize_bootstrap_address")
    monkeypatch.setattr(ray, "__version__", "2.99.0")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"Ray 2\.99\.0 has no .*canonicalize_bootstrap_address.*host:port"):
        start_ray("auto")


def test_a_token_that_ray_cannot_be_told_to_use_is_an_error_with_the_variable_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(tokens, "maybe_enable_token_auth_if_token_available")
    with pytest.raises(UserError, match=r"head:6379 asks for a token.*RAY_AUTH_MODE=token.*2\.60"):
        use_token("head:6379")


def test_the_level_of_rays_log_is_put_back_after_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def use(warn_if_disabled: bool) -> bool:
        seen.append(logging.getLogger("ray").getEffectiveLevel())
        return not warn_if_disabled

    monkeypatch.setattr(tokens, "maybe_enable_token_auth_if_token_available", use)
    monkeypatch.setattr(logging.getLogger("ray"), "level", logging.INFO)
    assert use_token("head:6379")
    assert seen == [logging.ERROR]
    assert logging.getLogger("ray").level == logging.INFO


def test_rays_messages_are_muted_until_the_end_of_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_private, "_printed_before", None)
    printed: list[object] = []
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, ignore_prefix: printed.append(data))
    own = worker.print_to_stdstream
    mute_raylet()
    mute_raylet()
    worker.print_to_stdstream({"lines": ["half a page"]}, ignore_prefix=False)
    assert printed == []
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    stop_ray()
    assert worker.print_to_stdstream is own
    unmute_raylet()
    assert worker.print_to_stdstream is own


def test_a_ray_without_that_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_private, "_printed_before", None)
    monkeypatch.delattr(worker, "print_to_stdstream")
    mute_raylet()
    unmute_raylet()
    assert not hasattr(worker, "print_to_stdstream")


@pytest.mark.parametrize(("known", "blamed"), [("_actor_id", 1), ("renamed", 0)])
def test_a_handle_without_its_id_lets_the_rank_be_blamed_that_was_asked(
    known: str, blamed: int, tmp_path: Path
) -> None:
    group = WorkerGroup("policy", RoleSpec(workers=2), LimitsSpec(), tmp_path)
    group._actors = [SimpleNamespace(**{known: bytes([rank])}) for rank in range(2)]
    death = RuntimeError()
    death.actor_id = "01"  # type: ignore[attr-defined]
    assert group.liveness._rank_of(Fault(0, death, died=True)) == blamed
