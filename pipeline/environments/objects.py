"""Environments as the user writes them, behind one reset and one step. Runs in their process (`child.py`).

- The general form has `reset` and `step(messages) -> messages, reward, done`.
- TRL's form (`environment_factory` of its GRPOTrainer) has no `step`: its public methods are tools, and
  `get_reward()` may score a whole conversation.
- Tools alone are functions.

All of them may be coroutines. An object is made for each sample, from the row and a seed: constructor and
`reset` get what their arguments name of `row` (all columns and the prompt), `seed`, and the columns.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

from pipeline.rewards.calling import taken

Message = dict[str, Any]
Kind = dict[str, Any]


class Unusable(Exception):
    """Raised where something of the user's is not what it has to be; its text is for the user."""


def found(place: str) -> Any:
    """The thing that `module:name` names. Raises whatever its import raises."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def described(env: str | None, tools: Sequence[str]) -> Kind:
    """Facts of an environment: `steps` (the general form), `rewards` (it has `get_reward`), `tools` (schemas,
    as templates take them).

    Raises:
        Unusable: what is wrong with it.
    """
    made = None if env is None else found(env)
    if made is not None and not callable(made):
        raise Unusable(f"{env} is no class but of type {type(made).__name__}")
    steps = made is not None and callable(getattr(made, "step", None))
    if made is not None and not callable(getattr(made, "reset", None)):
        raise Unusable(f"{env} has no method `reset`")
    functions = {} if steps else _functions(tools)
    if made is not None and not steps:
        functions |= {name: MethodType(getattr(made, name), made) for name in _methods(made)}
        if not functions:
            raise Unusable(
                f"{env} has neither `step` nor a public method that the policy could call as a tool"
            )
    schemas = [_schema(name, function) for name, function in functions.items()]
    rewards = made is not None and callable(getattr(made, "get_reward", None))
    return {"steps": steps, "rewards": rewards, "tools": schemas}


class SampleEnvironment:
    """The environment of one sample."""

    def __init__(self, env: str | None, tools: Sequence[str]) -> None:
        self._env, self._tools, self._object = env, _functions(tools), None
        self._steps = False

    async def reset(self, row: dict[str, Any], seed: int) -> list[Message] | str | None:
        """The messages that the conversation begins with; a text is added to the last message of the prompt;
        None: the prompt stands as it is."""
        if self._env is None:
            return None
        make = found(self._env)
        given = {
            **{name: value for name, value in row.items() if name.isidentifier()},
            "row": row,
            "seed": seed,
        }
        self._object = await settled(make(**wanted(make, given)))
        self._steps = callable(getattr(self._object, "step", None))
        if not self._steps:
            self._tools |= {name: getattr(self._object, name) for name in _methods(type(self._object))}
        reset = self._object.reset  # type: ignore[attr-defined]
        return _begun(await settled(reset(**wanted(reset, given))))

    async def step(self, messages: list[Message]) -> tuple[list[Message], float | None, bool]:
        """Answer a conversation that ends with a turn of the policy: messages, reward, done."""
        if self._steps:
            return _answered(await settled(self._object.step(messages)))  # type: ignore[attr-defined]
        calls = messages[-1].get("tool_calls") or []
        answers = [await self._called(call) for call in calls]
        return answers, None, not calls

    async def reward(self) -> float | None:
        """Reward of the whole conversation, where the environment has `get_reward`."""
        score = getattr(self._object, "get_reward", None)
        return None if score is None else number_of(await settled(score()))

    def close(self) -> None:
        """Nothing of it goes on by itself."""

    async def _called(self, call: dict[str, Any]) -> Message:
        """A tool's answer. What goes wrong in it is told to the policy, as TRL does."""
        function = call["function"]
        try:
            if function["name"] not in self._tools:
                raise ValueError(f"Tool {function['name']} not found.")
            arguments = json.loads(function["arguments"] or "{}")
            content = str(await settled(self._tools[function["name"]](**arguments)))
        except Exception as error:  # a tool of the user's, with arguments of the policy's
            content = str({"error": str(error)})
        return {"role": "tool", "name": function["name"], "tool_call_id": call["id"], "content": content}


async def settled(value: Any) -> Any:
    """The value, awaited where it is a coroutine's."""
    return await value if inspect.isawaitable(value) else value


def wanted(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function names, or takes by `**`."""
    names, _, any_name = taken(function)
    if any_name:  # `reset(**row)`, as TRL calls it
        return {name: value for name, value in given.items() if name not in ("row", "seed") or name in names}
    return {name: value for name, value in given.items() if name in names}


def _functions(tools: Sequence[str]) -> dict[str, Callable[..., Any]]:
    return {place.partition(":")[2]: found(place) for place in tools}


def _methods(made: type) -> list[str]:
    """Public methods that are tools, by TRL's rule."""
    named = [name for name, _ in inspect.getmembers(made, predicate=inspect.isfunction)]
    return [name for name in named if not name.startswith("_") and name not in ("reset", "get_reward")]


def _schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils import get_json_schema

    if not callable(function):
        raise Unusable(f"tool {name} is no function but of type {type(function).__name__}")
    try:
        schema: dict[str, Any] = get_json_schema(function)
    except Exception as error:  # transformers says what of the hints or the docstring is missing
        raise Unusable(f"tool {name}: {error}") from error
    return schema


def _begun(value: Any) -> list[Message] | str | None:
    return value if value is None or isinstance(value, str) else messages_of(value, "reset")


def _answered(value: Any) -> tuple[list[Message], float | None, bool]:
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise Unusable(f"step returned {_shown(value)}, not (messages, reward, done)")
    said, reward, done = value
    messages = (
        [{"role": "user", "content": said}] if isinstance(said, str) and said else messages_of(said, "step")
    )
    if not messages and not done:
        raise Unusable("step returned no message, though the conversation is not done")
    return messages, number_of(reward), bool(done)


def messages_of(value: Any, where: str) -> list[Message]:
    """Messages of an environment: a list of objects with `role` and `content`, both text.

    Raises:
        Unusable: it is something else.
    """
    if value is None or value == "":
        return []
    if not isinstance(value, list | tuple):
        raise Unusable(f"{where} returned {_shown(value)} as messages, not a list")
    for message in value:
        texts = isinstance(message, dict) and all(
            isinstance(message.get(k), str) for k in ("role", "content")
        )
        if not texts:
            raise Unusable(f"{where} returned {_shown(message)}, not a message with `role` and `content`")
        if where == "step" and message["role"] == "assistant":
            raise Unusable("step returned a message of the assistant, whose turns are the policy's")
    return [dict(message) for message in value]


def number_of(value: Any) -> float | None:
    """A reward as a number, or None. Raises Unusable for anything else."""
    if value is None:
        return None
    try:
        number = float(value)
    except Exception:
        number = math.nan
    if isinstance(value, str | bytes) or not math.isfinite(number):
        raise Unusable(f"the reward is {_shown(value)}, and a reward is a finite number or None")
    return number


def _shown(value: Any) -> str:
    from pipeline.rewards.values import shown_value

    return shown_value(value)
