"""The process of one rank: a log file, an environment, imports made early, and one object that does the work.

The module imports nothing heavy, so that a process is up in under a second; torch, transformers or
vLLM are imported in the background while the driver still reads its data. On one machine they may be there
already: processes are forked from one that has imported them (`actors.cluster.fast_start.fork_server`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import operator
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from actors.cluster.agreement import Answer, proof_of
from actors.cluster.environment import GLOO_INTERFACE, enter_shipped_files
from actors.cluster.pulse import Pulse, machine
from actors.cluster.scratch import Scratch
from actors.cluster.trace import CallTrace, named
from actors.errors import RunFailure, UserError

RENDEZVOUS_PORTS = range(20_000, 32_768)
"""Below Linux's ephemeral range: a port picked there can't be taken by an outgoing connection (Ray opens
hundreds) between the moment when it is picked and the moment when torch listens on it."""

Asked = tuple[str, str, float, dict[str, object]]
"""Method, phase, deadline in seconds and keyword arguments of a call. One argument to Ray, which serialises
and checks each by itself: of a call without large arguments that is a quarter of the driver's time."""

DUMP_AFTER_S = 1.0
"""A rank dumps its stacks this long before its caller's deadline, so that the log says where it hung."""


class Worker:
    """One rank of a group. Ray runs its methods one after the other on the process's main thread."""

    def __init__(self, who: str, log_path: str, env: Mapping[str, str], preload: Sequence[str] = ()) -> None:
        """`preload`: modules to import in the background."""
        self.who, self.log_path = who, log_path
        _die_with_parent()
        enter_shipped_files()
        self._log = _write_everything_to(log_path, who)
        self._trace = CallTrace(Path(log_path).parent / "trace" / f"{who}.jsonl")
        # Before any library is imported: OpenMP, torch and vLLM read these once. In a forked process OpenMP
        # and torch have read the fork server's, which are the same; the rest is read when vLLM is imported.
        os.environ.update(env)
        if GLOO_INTERFACE not in os.environ and (interface := _interface_of(_own_address())):
            os.environ[GLOO_INTERFACE] = interface
        # vLLM leaves files in the directory for temporary ones, of which a forked process knows the server's.
        tempfile.tempdir = None
        self._scratch = Scratch()
        tempfile.tempdir = os.environ["TMPDIR"] = str(self._scratch.path)
        self._pulse = Pulse(self._scratch.path / "pulse")
        self._object: object | None = None
        self._seconds: dict[str, float] = {}
        self._import_error: BaseException | None = None
        self._preload = threading.Thread(
            target=self._import, args=(list(preload),), daemon=True, name="preload"
        )
        self._preload.start()

    def ping(self) -> dict[str, str | int]:
        """Name, process id, machine, Ray's node, log file and the file of its pulse; answers as soon as the
        process is up."""
        return {
            "who": self.who,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "machine": machine(),
            "node": _own_node(),
            "log": self.log_path,
            "note": str(self._pulse.path),
        }

    def preloaded(self) -> dict[str, float]:
        """Seconds of the imports; answers when they are done."""
        self._preload.join()
        if self._import_error is not None:
            raise self._as_failure(self._import_error, "start")
        return dict(self._seconds)

    def rendezvous(self, one_node: bool) -> str:
        """Address at which the ranks of this group meet: tcp://host:port, free at this moment."""
        host = "127.0.0.1" if one_node else _own_address()
        return f"tcp://{host}:{_free_port()}"

    def build(
        self,
        target: str,
        phase: str,
        limit_s: float,
        init_method: str | None,
        args: Sequence[object],
        kwargs: dict[str, object],
    ) -> float:
        """Make the object that does the work (`module:Class`), in place of an earlier one; seconds taken."""
        if init_method is not None:
            kwargs = {**kwargs, "init_method": init_method}
        began = time.monotonic()
        with self._reported(phase, limit_s), self._trace.call("build", phase):
            self.preloaded()
            self._drop()
            module, _, name = target.partition(":")
            self._object = getattr(importlib.import_module(module), name)(*args, **kwargs)
        return time.monotonic() - began

    def call(self, asked: Asked, *args: object) -> object:
        """Call a method of the object (`part.method` of a part of it). `args` come last, where Ray resolves
        references.

        Raises:
            UserError, RunFailure: as the method raised them; anything else becomes a RunFailure with the
                last line of the error and the log file, which has the traceback.
        """
        method, phase, limit_s, kwargs = asked
        with self._reported(phase, limit_s):
            if self._object is None:
                raise RuntimeError(f"{self.who} was asked to {method} before it was built")
            work = operator.attrgetter(method)(self._object)
            names = named(work, args, kwargs)
            with self._trace.call(method, phase, names), self._pulse.during(method, names.get("step")):
                return work(*args, **kwargs)

    def call_aside(self, method: str, phase: str, args: Sequence[object]) -> object:
        """`call`, in a thread of its own, while another call works. No deadline is watched here.

        Raises: as `call`.
        """
        try:
            if self._object is None:
                raise RuntimeError(f"{self.who} was asked to {method} before it was built")
            with self._trace.call(method, phase):
                return operator.attrgetter(method)(self._object)(*args)
        except (UserError, RunFailure):
            raise
        except Exception as error:
            traceback.print_exc()
            raise self._as_failure(error, phase) from None

    def call_alike(
        self, asked: Asked, own: Sequence[str], exact: bool, hands_over: bool, *args: object
    ) -> Answer:
        """`call`, of what every rank has alike: proof of the result, and where this rank `hands_over` the
        result. `own`, `exact`: of `proof_of`."""
        value = self.call(asked, *args)
        return Answer(proof_of(value, own, exact), value if hands_over else None)

    def work(self, target: str, phase: str, limit_s: float, args: Sequence[object]) -> object:
        """Call a function (`module:function`) that needs the preloaded imports, and no object."""
        with self._reported(phase, limit_s), self._trace.call(target.partition(":")[2], phase):
            self.preloaded()
            module, _, name = target.partition(":")
            return getattr(importlib.import_module(module), name)(*args)

    def stop(self) -> None:
        """Let the object close what it holds (process groups, engines)."""
        with contextlib.suppress(Exception):
            self._drop()
        self._pulse.end()
        self._scratch.remove()
        self._log.flush()

    def _drop(self) -> None:
        if self._object is None:
            return
        held, self._object = self._object, None
        if hasattr(held, "close"):
            held.close()
        del held
        gc.collect()

    @contextlib.contextmanager
    def _reported(self, phase: str, limit_s: float) -> Iterator[None]:
        """Errors with their type, tracebacks to the log, and all stacks to the log on an overrun."""
        faulthandler.dump_traceback_later(max(limit_s - DUMP_AFTER_S, limit_s * 0.9), file=self._log)
        try:
            yield
        except (UserError, RunFailure) as error:
            print(f"{self.who}: {phase}: {error}", flush=True)
            raise
        except Exception as error:
            traceback.print_exc()
            raise self._as_failure(error, phase) from None
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _as_failure(self, error: BaseException, phase: str) -> RunFailure:
        lines = [line for line in str(error).splitlines() if line.strip()] or ["(no message)"]
        return RunFailure(self.who, phase, f"{type(error).__name__}: {lines[-1]}", f"see {self.log_path}")

    def _import(self, modules: list[str]) -> None:
        # Nothing that is imported becomes garbage: without the collector torch + transformers + peft take
        # 2.8 instead of 3.4 CPU seconds, vLLM 4.0 instead of 6.1.
        gc.disable()
        try:
            for module in modules:
                began = time.monotonic()
                importlib.import_module(module)
                self._seconds[module] = round(time.monotonic() - began, 3)
            gc.freeze()
        except BaseException as error:
            traceback.print_exc()
            self._import_error = error
        finally:
            gc.enable()


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when Ray's node process (or the fork server) goes, however busy
    this one is: an orphan in a long native call would keep its core."""
    import ctypes

    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _write_everything_to(log_path: str, who: str) -> TextIO:
    """Point stdout and stderr, of Python and of native code, to the log file."""
    Path(log_path).parent.mkdir(parents=True, exist_ok=True)
    log = open(log_path, "a", buffering=1)  # noqa: SIM115  stays open as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    # Ray has put writers of its own here, which would keep Python's output in Ray's session directory.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(file=log)
    print(f"--- {who} pid {os.getpid()} {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
    return log


def _own_node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def _own_address() -> str:
    import ray

    return ray.util.get_node_ip_address()


def _interface_of(address: str) -> str | None:
    """The network interface of this machine that has an address."""
    import psutil

    found = psutil.net_if_addrs().items()
    return next((name for name, has in found if any(one.address == address for one in has)), None)


def _free_port() -> int:
    """A port of `RENDEZVOUS_PORTS` that nobody listens on.

    Raises:
        OSError: none of 200 tries was free.
    """
    chosen = random.SystemRandom().sample(RENDEZVOUS_PORTS, 200)
    for port in chosen:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {RENDEZVOUS_PORTS.start} and {RENDEZVOUS_PORTS.stop}")
