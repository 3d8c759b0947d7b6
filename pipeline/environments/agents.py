"""Agents of the user's as environments: what one asks of an OpenAI-compatible endpoint are the turns of its
conversation. Runs in their process (`child.py`).

An agent is a function that drives a conversation by itself. To the rest it has an environment's face: `reset`
runs it up to its first request, `step` answers the request that is open and runs it up to the next one.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import os
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.environments.chat_requests import (
    AgentRequest,
    DrawnTurn,
    Message,
    Refused,
    StageSampling,
    completion,
    problem_of,
    read_request,
)
from pipeline.environments.objects import Kind, Unusable, found, number_of, settled, wanted
from pipeline.rewards.calling import taken
from pipeline.rewards.child import shown

HOST = "127.0.0.1"
GIVEN = ("base_url", "api_key")
"""Arguments of an agent without which it can't ask."""
AT_LIMIT = (
    "the conversation ends here: it is as long as the stage allows (max_completion_length, "
    "max_tool_calling_iterations); return the reward"
)
OVER = "this conversation is over"

Answer = tuple[int, dict[str, Any]]
"""HTTP status and JSON."""


def described_agent(agent: str) -> Kind:
    """Facts of an agent, as `objects.described` has them.

    Raises:
        Unusable: what is wrong with it.
    """
    function = found(agent)
    if not callable(function) or inspect.isclass(function):
        raise Unusable(f"{agent} is no function; a class with `reset` and `step` is named by `env`")
    names, _, any_name = taken(function)
    if lacking := [name for name in GIVEN if name not in names and not any_name]:
        raise Unusable(
            f"{agent} takes no argument {' and no '.join(lacking)}, with which it would make its client"
        )
    return {"steps": True, "rewards": True, "tools": []}


class Endpoint:
    """The HTTP server on this machine alone that agents' requests come to; each conversation has a key of its
    own."""

    def __init__(self) -> None:
        self._open: dict[str, AgentConversation] = {}
        self.base_url = ""

    async def start(self) -> None:
        """Serve at a port that is free."""
        import socket

        import uvicorn

        for name in ("no_proxy", "NO_PROXY"):  # Clients would ask a proxy for this machine.
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST]))
        listener = socket.socket()
        listener.bind((HOST, 0))
        self.base_url = f"http://{HOST}:{listener.getsockname()[1]}/v1"

        class QuietServer(uvicorn.Server):
            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # Signals are for the run.

        config = uvicorn.Config(self._app(), log_level="error", access_log=False, lifespan="off")
        self._serving = asyncio.create_task(QuietServer(config).serve(sockets=[listener]))

    def opened(self, conversation: AgentConversation) -> str:
        """The key of a conversation, until it is closed."""
        key = f"sk-{secrets.token_hex(16)}"
        self._open[key] = conversation
        return key

    def closed(self, key: str) -> None:
        self._open.pop(key, None)

    def _app(self) -> Any:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        async def complete(request: Request) -> JSONResponse:
            key = request.headers.get("authorization", "").removeprefix("Bearer ")
            conversation = self._open.get(key)
            if conversation is None:
                text = f"the api_key is of no conversation that goes on ({OVER}, or the key is another one)"
                return JSONResponse(problem_of(text), 401)
            again = request.headers.get("x-stainless-retry-count", "0") != "0"
            status, body = await conversation.answer(await request.body(), again)
            return JSONResponse(body, status)

        async def models(request: Request) -> JSONResponse:
            model = {"id": "policy", "object": "model", "created": 0, "owned_by": "raylign"}
            return JSONResponse({"object": "list", "data": [model]})

        return Starlette(
            routes=[
                Route("/v1/chat/completions", complete, methods=["POST"]),
                Route("/v1/models", models, methods=["GET"]),
            ]
        )


class AgentConversation:
    """One sample's agent, with an environment's face."""

    def __init__(self, agent: str, endpoint: Endpoint) -> None:
        self._agent, self._endpoint, self._key = agent, endpoint, ""
        self._events: asyncio.Queue[AgentRequest | Refused | _Returned] = asyncio.Queue()
        """What the agent does."""
        self._work: asyncio.Task[None] | None = None
        self._returned: _Returned | None = None
        self._prompt: list[Message] = []
        self._conversation: list[Message] | None = None
        self._tools: list[dict[str, Any]] | None = None
        self._body, self._model = b"", ""
        self._reply: asyncio.Future[Answer] | None = None
        """To the last request, which is `_body`."""
        self._over = ""
        """The reason for which no further request is answered."""

    async def reset(self, row: dict[str, Any], seed: int, sampling: StageSampling) -> AgentRequest:
        """Begin; its first request."""
        self._sampling, self._prompt = sampling, copy.deepcopy(row["prompt"])  # Agents append to theirs.
        self._key = self._endpoint.opened(self)
        function = found(self._agent)
        given = {
            **{name: value for name, value in row.items() if name.isidentifier()},
            "row": row, "seed": seed, "base_url": self._endpoint.base_url, "api_key": self._key,
        }  # fmt: skip
        self._work = asyncio.create_task(self._run(function, wanted(function, given)))
        asked = await self._next()
        if asked is None:
            raise Unusable("it returned without having asked for a turn of the policy")
        return asked

    async def step(
        self, messages: list[Message], turn: DrawnTurn
    ) -> AgentRequest | tuple[list[Message], None, bool]:
        """Answer the open request with the turn that `messages` end with; the next request, or the end as an
        environment's step has it."""
        assert self._reply is not None
        self._conversation = messages
        if not self._reply.done():
            name = f"chatcmpl-{self._key[3:15]}-{len(messages)}"
            self._reply.set_result((200, completion(self._model, messages[-1], turn, name)))
        return await self._next() or ([], None, True)

    async def reward(self) -> float | None:
        """Its reward for the whole conversation. An agent that is cut at a limit is told so, and has time to
        return one; none if it raises then."""
        if self._returned is None:
            self._end(AT_LIMIT)
            with suppress(Unusable):
                await self._next()
        return None if self._returned is None else number_of(self._returned.value)

    def close(self) -> None:
        """Answer no more. A thread that it works in learns that at its next request."""
        self._endpoint.closed(self._key)
        self._end(OVER)
        if self._work is not None:
            self._work.cancel()

    async def answer(self, body: bytes, again: bool) -> Answer:
        """The answer to a request, once its turn was drawn. `again`: the client sends it once more, since
        its connection failed or was too slow for it."""
        waits = self._reply is not None and not self._reply.done()
        if not (body == self._body and (waits or again)):
            if self._over:
                return self._refusal()
            try:
                self._take(body, waits)
            except Refused as refused:
                self._end(str(refused))
                self._events.put_nowait(refused)
                return 400, problem_of(str(refused))
        assert self._reply is not None
        return await asyncio.shield(self._reply)

    # --- Inside -----------------------------------------------------------------------------------

    def _take(self, body: bytes, waits: bool) -> None:
        """Let the request be known. Raises Refused."""
        if waits:
            raise Refused("a conversation has one request at a time, and one is being answered")
        try:
            given = json.loads(body)
        except ValueError as error:
            raise Refused(f"the request is no JSON: {error}") from None
        asked = read_request(given, self._sampling, self._prompt, self._conversation, self._tools)
        self._tools, self._body, self._model = asked.tools, body, str(given.get("model") or "policy")
        self._reply = asyncio.get_running_loop().create_future()
        self._events.put_nowait(asked)

    async def _next(self) -> AgentRequest | None:
        """Its next request, or None once it has returned. Raises Unusable where it went wrong."""
        event = await self._events.get()
        if isinstance(event, AgentRequest):
            return event
        if isinstance(event, Refused):
            raise Unusable(f"its request was refused: {event}")
        if event.problem:
            raise Unusable(event.problem)
        self._returned = event
        self._end(OVER)
        return None

    def _end(self, why: str) -> None:
        self._over = self._over or why
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(self._refusal())

    def _refusal(self) -> Answer:
        return 400, problem_of(self._over, "context_length_exceeded" if self._over == AT_LIMIT else None)

    async def _run(self, function: Callable[..., Any], given: dict[str, Any]) -> None:
        """Work to its end: a coroutine in this loop, a function in a thread of its own."""
        try:
            made = function(**given) if inspect.iscoroutinefunction(function) else _thread(function, given)
            event = _Returned(await settled(await made), "")
        except asyncio.CancelledError:
            if self._over:
                raise
            event = _Returned(None, "it raised CancelledError")
        except BaseException as error:  # whatever an agent raises, also SystemExit
            event = _Returned(None, f"it raised {shown(error)}")
        self._events.put_nowait(event)


class _Returned:
    """End of an agent: its reward, or what went wrong."""

    def __init__(self, value: Any, problem: str) -> None:
        self.value, self.problem = value, problem


def _thread(function: Callable[..., Any], given: dict[str, Any]) -> Awaitable[Any]:
    """Result of a call in a thread of its own, which holds nobody up at the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def work() -> None:
        value, failure = None, None
        try:
            value = function(**given)
        except BaseException as error:  # `_run` says it
            failure = error
        with suppress(RuntimeError):  # The loop has ended.
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=work, daemon=True, name="agent").start()
    return future
