"""A Ray cluster that was there before this process: how its head is found, and what is watched of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.cluster.ray_private import MODE, head_address, raylet_beside, use_token
from actors.cluster.ray_watch import Probe, RayWatch
from actors.errors import AGAIN, RunFailure, UserError

REACH_S = 5.0
"""Seconds to wait for a cluster's head to accept a connection; one that is there answers in milliseconds."""


class JoinedCluster:
    """The connection to it, as soon as this is made. Nothing of it is ended from here."""

    def __init__(self, address: str, by: str, settings: Mapping[str, Any]) -> None:
        """`address`: `auto`, or host:port of the cluster's head; `by`: key or variable that has it;
        `settings`: of `ray.init`.

        Raises:
            UserError: there is no cluster, its Ray or Python version differs, or it asks for a token.
        """
        head = _head_of(address, by)
        match_tokens(head, by)
        import ray

        try:
            ray.init(address=head, **settings)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise UserError(
                f"{by}: no Ray cluster could be used at {address}: {str(error).strip().splitlines()[0]}; "
                f"for a local cluster that ends with the run, leave {by} out"
            ) from None
        probe = Probe(lambda: asks_for_token(head) is not None)
        self._watch = RayWatch(raylet_beside(), ray.is_initialized, {f"the GCS at {head}": probe}, own=False)

    def lost(self, now: bool = False) -> RunFailure | None:
        """The failure behind whatever fails once a part of Ray's is lost without which nothing goes on.
        `now`: looks, where it is else known a moment later."""
        if now:
            self._watch.look()
        reason = self._watch.lost
        return None if reason is None else RunFailure("ray", "run", reason, AGAIN)

    def end(self, failed: bool = False) -> Path | None:
        """Disconnect; None, as its logs are its own. It is watched meanwhile: Ray's shutdown asks the raylet,
        without a deadline."""
        import ray

        ray.shutdown()
        self._watch.end()
        self._watch.unwound()
        return None


def _head_of(address: str, by: str = "ray.address") -> str:
    """host:port of the cluster's head, which accepts connections.

    Raises:
        UserError: nothing is there. Ray itself would try for ten minutes.
    """
    if "://" in address:
        what = "a Ray Client address" if address.startswith("ray://") else "the address of a dashboard"
        raise UserError(
            f"{by}: {address} is {what}; give host:port of the cluster's head and run on one of its "
            f"machines, or send the run there with `raylign submit`; for a local cluster, leave {by} out"
        )
    try:
        head = head_address(address)
        if head is None:
            raise UserError(f"{by}: {address}, but no cluster was started here with `ray start`")
        host, _, port = head.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (ValueError, OverflowError):  # the latter of a port beyond 65535
        raise UserError(f"{by}: {address!r} is neither auto nor host:port") from None
    except OSError as error:
        raise UserError(f"{by}: nothing answers at {address} ({error.strerror or error})") from None
    return head


def match_tokens(head: str, key: str = "ray.address") -> None:
    """Show this machine's token to a cluster that asks for one, and to no other.

    Given an address, Ray decides by the variable RAY_AUTH_MODE alone, which few people set; with the wrong
    mode it prints warnings for 18 s, or connects and then loses every actor.

    Args:
        head: host:port of the cluster's head.
        key: what named the cluster, for the error.

    Raises:
        UserError: the cluster asks for a token and there is none here.
    """
    if MODE in os.environ or not asks_for_token(head):
        return
    if not use_token(head, key):
        raise UserError(
            f"{key}: the cluster at {head} asks for a token and there is none here: copy the head's "
            "~/.ray/auth_token, or name the file in RAY_AUTH_TOKEN_PATH"
        )


def asks_for_token(head: str) -> bool | None:
    """True where the cluster's head at host:port asks for a token; None where no head answers."""
    import grpc

    with grpc.insecure_channel(head, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=REACH_S)
        except grpc.RpcError as error:
            return True if error.code() is grpc.StatusCode.UNAUTHENTICATED else None
    return False
