"""A Ray cluster of this process alone: it listens on loopback only, keeps its files in a scratch directory,
and is gone with the process."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from actors.cluster.environment import SOCKETS, beside_proxies
from actors.cluster.ray_private import TRIED, forget_token, on_loopback, own_processes
from actors.cluster.ray_watch import RayWatch
from actors.cluster.scratch import Scratch, unfit
from actors.errors import AGAIN, RunFailure
from actors.variables import variables_set

SOCKET_ROOM = len("/session_2026-11-30_10-48-07_418268_1234567/sockets/plasma_store")
"""Bytes that Ray adds to its directory's path, for the longest of its sockets' names."""
SHUTDOWN_S = 20.0
"""Longest wait for Ray's shutdown, which takes a tenth of a second, before its processes are killed."""
TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class LocalCluster:
    """The cluster, which runs as soon as this is made."""

    def __init__(
        self, settings: Mapping[str, Any], starting: AbstractContextManager[str], keep: Path | None
    ) -> None:
        """`settings`: of `ray.init`, during which `starting` is entered, which gives a line that says how.
        `keep`: directory that Ray's logs are moved to when the run fails.

        Raises:
            UserError: there is no place for its files.
            RunFailure: it does not come up, as on a machine that is busy with other work.
        """
        self._keep = keep
        self._rays = Scratch(SOCKET_ROOM)
        self._files = self._rays if _usual(self._rays) else Scratch()
        import ray

        self._watch: RayWatch | None = None
        self.how = self._start(settings, starting)
        """One line for the log: started fast or plain, and what is not as usual."""
        self._watch = RayWatch(own_processes(), ray.is_initialized)

    def lost(self, now: bool = False) -> RunFailure | None:
        """The failure behind whatever fails once a part of Ray's is lost without which nothing goes on.
        `now`: looks, where it is else known a moment later."""
        if self._watch is not None and now:
            self._watch.look()
        reason = self._watch.lost if self._watch is not None else None
        return None if reason is None else RunFailure("ray", "run", reason, AGAIN)

    def end(self, failed: bool = False) -> Path | None:
        """End it and remove its files; of a `failed` run Ray's logs are kept: returns their directory."""
        self._shut_down()
        forget_token()
        kept = self._keep_logs() if failed else None
        for scratch in {self._rays, self._files}:
            if kept is not None and kept.is_relative_to(scratch.path):
                scratch.leave()
            else:
                scratch.remove()
        return kept

    def _shut_down(self) -> None:
        """Ray's own shutdown asks the raylet, without a deadline: what is stopped is killed past ours."""
        import ray

        if self._watch is None:
            ray.shutdown()
            return
        self._watch.end()
        # Ray allows its shutdown in any thread.
        ending = threading.Thread(target=ray.shutdown, daemon=True, name="stop-ray")
        ending.start()
        ending.join(SHUTDOWN_S)
        if ending.is_alive():
            self._watch.kill()
            ending.join(SHUTDOWN_S)
        self._watch.unwound()

    def _start(self, settings: Mapping[str, Any], starting: AbstractContextManager[str]) -> str:
        import ray

        with (
            _environment(self._rays.path, self._files.path),
            on_loopback() as loopback,
            starting as how,
        ):
            try:
                ray.init(address="local", _temp_dir=str(self._rays.path), **settings)
            except Exception as error:  # a bare one where Ray's processes don't come up in time
                reason = (str(error) or type(error).__name__).splitlines()[0]
                where = self.end(failed=True)
                raise RunFailure("ray", "start", reason, _advice(where)) from error
        if not loopback:
            how += f"; it listens on all of the machine's addresses, as this Ray is not {TRIED}"
        unusual = unfit(Path(tempfile.gettempdir()), SOCKET_ROOM)
        if unusual is not None and not os.environ.get("RAY_TMPDIR"):
            how += f"; its files are in {self._rays.path}, as TMPDIR is {unusual}"
        return how

    def _keep_logs(self) -> Path | None:
        """Move Ray's logs to where they are kept; their directory, None if there are none."""
        sessions = [path for path in self._rays.path.glob("session_*") if not path.is_symlink()]
        if not sessions:
            return None
        logs = sessions[0] / "logs"
        if self._keep is None:
            return logs
        try:
            shutil.rmtree(self._keep, ignore_errors=True)
            shutil.move(logs, self._keep)
        except OSError:  # such as a full disk, which may be the failure
            return logs
        return self._keep


def _usual(scratch: Scratch) -> bool:
    """It lies where this process's temporary files do."""
    return scratch.path.parent == Path(tempfile.gettempdir()).absolute()


def _advice(logs: Path | None) -> str:
    look = f"look at Ray's logs in {logs}" if logs is not None else "set ray.fast_start: false"
    return (
        "try again: a machine that is busy with other work is too slow for Ray's own deadlines; if that does "
        f"not help, {look}, and at free memory and disk"
    )


@contextlib.contextmanager
def _environment(rays: Path, files: Path) -> Iterator[None]:
    """Variables that Ray's processes, and so all actors, inherit while they are started."""
    new = {"TMPDIR": str(files)} | beside_proxies(["127.0.0.1", "localhost", "::1"]) | _token(rays)
    if rays != files and SOCKETS not in os.environ:
        new[SOCKETS] = str(rays)
    # Ray sets variables of its token by itself: they go too.
    kept = {name: os.environ.get(name) for name in TOKEN_VARIABLES}
    with variables_set({**kept, **new}):
        yield


def _token(directory: Path) -> dict[str, str]:
    """Variables by which the cluster has a token of its own, where the user has none.

    Ray would write one into the home, which containers often can't; and from then on a cluster that the user
    starts with `ray start` would ask for it.
    """
    if any(name in os.environ for name in TOKEN_VARIABLES) or _has_token():
        return {}
    path = directory / "auth_token"
    with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    # Without RAY_AUTH_MODE: Ray sets that itself, and tells its parts that are loaded already.
    return {"RAY_AUTH_TOKEN_PATH": str(path)}


def _has_token() -> bool:
    home = os.environ.get("HOME")
    with contextlib.suppress(OSError, ValueError):
        return bool(home) and bool((Path(str(home)) / ".ray" / "auth_token").read_text().strip())
    return False
