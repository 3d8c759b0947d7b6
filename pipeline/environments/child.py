"""Entry of a process in which environments, tools and agents of the user's work, one object for each sample.

Coroutines of many samples go on together. What is no coroutine has the main thread to itself, one after the
other, as reward functions do; an agent has a thread of its own. Loads nothing but Python's own modules and
the user's (transformers for the schemas of tools, a server for agents).

Requests are pickled tuples with the sample's number: ("reset", number, row, seed), ("step", number,
messages), ("end", number), ("drop", number). Each but the last is answered by ("begun", number), then
("done", number, value) or ("failed", number, text). An agent's have one thing more: the stage's sampling, and
what is known of the turn.
"""

from __future__ import annotations

import asyncio
import pickle
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from pipeline.environments.agents import AgentConversation, Endpoint, described_agent
from pipeline.environments.objects import SampleEnvironment, Unusable, described
from pipeline.rewards.child import load_first, main, sender, settle, shown

BEGIN_AT_ONCE = 64
"""Agents on their way to a first request. A client of OpenAI's takes 20 ms of a core to make, so that a
thousand at once would all be late."""

OneSample = SampleEnvironment | AgentConversation


def start() -> None:
    """Serve the process that started this one."""
    main(serve_environments)


def serve_environments(connection: Connection) -> None:
    """Import the user's code, describe it, then serve its samples until the connection is closed."""
    send = sender(connection)
    load_first(connection, send)
    try:
        env, tools, agent, seconds = pickle.loads(connection.recv_bytes())
        kind = described(env, tools) if agent is None else described_agent(agent)
        reply: tuple[Any, ...] = ("described", kind)
    except (EOFError, OSError):
        return
    except Unusable as error:
        reply = "failed", str(error)
    except BaseException as error:
        reply = "failed", shown(error)
    settle(send, reply)
    if reply[0] == "described":
        asyncio.run(_serve(connection, send, env, tools, agent, seconds))


async def _serve(
    connection: Connection,
    send: Callable[..., None],
    env: str | None,
    tools: list[str],
    agent: str | None,
    seconds: float,
) -> None:
    make: Callable[[], OneSample] = partial(SampleEnvironment, env, tools)
    if agent is not None:
        endpoint = Endpoint()
        await endpoint.start()
        make = partial(AgentConversation, agent, endpoint)
    await _Host(connection, send, make, seconds, agent is not None).serve()


class _Host:
    """Samples of this process, by number."""

    def __init__(
        self,
        connection: Connection,
        send: Callable[..., None],
        make: Callable[[], OneSample],
        seconds: float,
        agents: bool,
    ) -> None:
        self._connection, self._send, self._make, self._seconds = connection, send, make, seconds
        self._agents = agents
        self._samples: dict[int, OneSample] = {}
        self._turn: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        """Requests of one sample come one after the other."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._beginning = asyncio.Semaphore(BEGIN_AT_ONCE)

    async def serve(self) -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._connection.fileno(), self._receive, ended)
        await ended.wait()

    def _receive(self, ended: asyncio.Event) -> None:
        try:
            request = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            ended.set()
            return
        task = asyncio.get_running_loop().create_task(self._serve(*request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, kind: str, number: int, *given: Any) -> None:
        begins = kind == "reset" and self._agents
        async with self._turn[number], self._beginning if begins else nullcontext():
            if kind == "drop":
                self._forget(number)
                return
            self._send(("begun", number))
            try:
                # No task of its own: what has begun is at work, until it waits for something.
                async with asyncio.timeout(self._seconds):
                    value = await self._answer(kind, number, given)
                reply: tuple[Any, ...] = ("done", number, value)
            except asyncio.CancelledError:  # The run has ended.
                raise
            except TimeoutError:
                reply = "failed", number, f"no answer within {self._seconds:g} s"
            except Unusable as error:
                reply = "failed", number, str(error)
            except BaseException as error:  # whatever an environment raises, also SystemExit
                reply = "failed", number, f"it raised {shown(error)}"
            settle(self._send, reply)
        if kind == "end":
            self._forget(number)

    def _forget(self, number: int) -> None:
        if (sample := self._samples.pop(number, None)) is not None:
            sample.close()

    async def _answer(self, kind: str, number: int, given: tuple[Any, ...]) -> Any:
        if kind == "reset":
            self._samples[number] = self._make()
            return await self._samples[number].reset(*given)
        sample = self._samples[number]
        return await sample.reward() if kind == "end" else await sample.step(*given)
