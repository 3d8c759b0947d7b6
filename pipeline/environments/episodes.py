"""The conversations of one step: each sample's turns, drawn by the engines and answered by its environment.

`Episodes` is what the pool of engines asks for turns and tells of those that were drawn; it never waits where
a turn could be drawn. What it makes of a sample follows from the row, the seeds and the policy alone: not
from which engine draws a turn, nor when.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.batches import (
    FINISH_REASONS,
    Episode,
    Generations,
    GrowingSample,
    Parsing,
    Request,
    Said,
    SamplingSpec,
)
from actors.errors import RunFailure
from pipeline.data.reading.bad_rows import RowProblem
from pipeline.data.reading.messages import Message
from pipeline.data.tokens.environment_turns import NotExact
from pipeline.environments.chat_requests import AgentRequest, DrawnTurn, StageSampling
from pipeline.environments.prepared import Conversing
from pipeline.environments.processes import EnvironmentProcess, EnvironmentReply

CUT = FINISH_REASONS.index("length")
_NAME = re.compile(r"[\w.-]{1,64}")
"""Names of tools; anything else that the policy calls is `unknown`, so that no name can imitate a turn."""


def turn_seed(seed: int, turn: int) -> int:
    """63-bit seed of one turn of the sample with this seed; the first turn has the sample's own."""
    if turn == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Start:
    """The beginning of one sample."""

    row: dict[str, Any]
    """All columns, and `prompt` as messages."""
    text: str
    """The prompt as the model reads it."""
    token_ids: list[int]
    kwargs: dict[str, Any]
    """Variables of the chat template."""
    seed: int
    """Of the sample."""
    env_seed: int
    """Of its environment: samples of one prompt share it, since they are compared."""


@dataclass
class _Talk:
    """One sample's conversation."""

    start: Start
    messages: list[Message]
    first: int
    """Messages of the prompt."""
    text: str
    sample: GrowingSample
    kwargs: dict[str, Any]
    """Variables of the chat template."""
    phase: str = "reset"
    ended: str = ""
    last_request: int | None = None
    asked: AgentRequest | None = None
    """The agent's request that is open."""


class Episodes:
    """Conversations with the environments of one process."""

    def __init__(
        self,
        settings: Conversing,
        process: EnvironmentProcess,
        tokenizer: Any,
        sampling: SamplingSpec,
        starts: Sequence[Start],
    ) -> None:
        """Begin one conversation for each of `starts`."""
        self._settings, self._process, self._tokenizer = settings, process, tokenizer
        self._sampling = sampling
        self._talks = [
            _Talk(
                one,
                list(one.row["prompt"]),
                len(one.row["prompt"]),
                one.text,
                GrowingSample(one.token_ids),
                one.kwargs,
            )
            for one in starts
        ]
        self._of_request: list[int] = []
        """Request -> sample."""
        self._ready: list[Request] = []
        self._label = ""
        way = StageSampling(sampling.temperature, sampling.stop, settings.spec.tool_parser)
        more = [way] if settings.spec.agent else []
        for number, one in enumerate(starts):
            process.reset(number, one.row, one.env_seed, *more)

    @property
    def parsing(self) -> Parsing | None:
        return self._settings.parsing

    def waits(self) -> bool:
        return bool(self._ready) or self._process.busy

    def requests(self, seconds: float) -> list[Request]:
        """Turns that can be drawn now; waits up to so many seconds for one, where none can be.

        Raises:
            RunFailure: an environment failed, and nothing stands in for its answer.
        """
        for reply in self._process.replies(0.0 if self._ready else seconds):
            self._answered(reply)
        found, self._ready = self._ready, []
        return found

    def drew(self, numbers: Sequence[int], made: Generations, said: Sequence[Said] | None) -> None:
        """Take turns that were drawn, and let their environments answer."""
        stop = self._sampling.stop
        texts = [] if said else made.texts(self._tokenizer, stop, self._sampling.stop_token_ids)
        routes = None if made.routed_experts is None else made.routed_experts.samples()
        self._label = made.label
        for i, number in enumerate(numbers):
            sample = self._of_request[number]
            talk, place = self._talks[sample], slice(int(made.offsets[i]), int(made.offsets[i + 1]))
            talk.sample.drew(
                made.token_ids[place].tolist(),
                made.logprobs[place].tolist(),
                made.token_versions[place].tolist(),
                int(made.finish[i]),
                None if routes is None else routes[i],
            )
            talk.last_request, talk.phase = number, "step"
            message = _turn(said[i], talk.sample.turns) if said else _turn(Said(texts[i], []), 0)
            talk.messages.append(message)
            more = [] if talk.asked is None else [self._drawn(talk, made, i)]
            self._process.step(sample, talk.messages, *more)

    def made(self, n: int, seconds: float) -> Generations:
        """All samples, once no conversation waits."""
        episodes = [
            Episode(
                prompt_ids=talk.sample.prompt_ids,
                prompt_text=talk.text,
                prompt=talk.messages[: talk.first],
                messages=talk.messages[talk.first :],
                turns=talk.sample.turns,
                ended=talk.ended,
            )
            for talk in self._talks
        ]
        return Generations.of_episodes([one.sample for one in self._talks], episodes, n, self._label, seconds)

    # --- Answers of environments --------------------------------------------------------------------

    def _answered(self, reply: EnvironmentReply) -> None:
        talk = self._talks[reply.number]
        if reply.problem:
            self._failed(reply.number, reply.problem)
        elif talk.phase == "end":
            self._earned(talk, reply.value)
        elif isinstance(reply.value, AgentRequest):
            self._asked_by_agent(reply.number, reply.value)
        elif talk.phase == "reset":
            self._begin(reply.number, reply.value)
        else:
            self._go_on(reply.number, *reply.value)

    def _asked_by_agent(self, number: int, asked: AgentRequest) -> None:
        """Draw the turn that an agent asks for: its messages are what an environment would have said."""
        talk = self._talks[number]
        talk.asked = asked
        if talk.phase != "reset":
            self._go_on(number, asked.messages or [], None, False)
            return
        if asked.tools is None:
            self._begin(number, asked.messages)
            return
        talk.kwargs = {**talk.kwargs, "tools": asked.tools}
        self._begin(number, asked.messages or talk.messages)

    def _drawn(self, talk: _Talk, made: Generations, i: int) -> DrawnTurn:
        """Facts of turn `i` of those made, the last one of `talk`, for its agent."""
        place = slice(int(made.offsets[i]), int(made.offsets[i + 1]))
        ids = made.token_ids[place].tolist()
        tokens = None
        if talk.asked is not None and talk.asked.logprobs:
            texts = self._tokenizer.batch_decode([[one] for one in ids])
            tokens = list(zip(texts, made.logprobs[place].tolist(), strict=True))
        before = len(talk.sample.context) - len(ids)
        return DrawnTurn(FINISH_REASONS[made.finish[i]], before, len(ids), tokens)

    def _begin(self, number: int, said: list[Message] | str | None) -> None:
        """Draw the first turn of a conversation, with what its environment said at its reset, or its agent in
        its first request."""
        talk, begun = self._talks[number], "first request" if self._settings.spec.agent else "reset"
        if said:
            if isinstance(said, str):
                last = talk.messages[-1]
                said = [*talk.messages[:-1], {**last, "content": last["content"] + said}]
            turns = self._settings.turns_of(talk.kwargs)
            try:
                text, ids = turns.beginning(said, talk.kwargs)
            except RowProblem as problem:
                raise self._failure(number, f"its {begun}: {problem.detail}") from None
            if len(ids) > self._settings.room:
                detail = (
                    f"{len(ids)} tokens, and max_length - max_completion_length leaves {self._settings.room}"
                )
                raise self._failure(number, f"its {begun} made the prompt too long: {detail}")
            talk.messages, talk.first, talk.text = list(said), len(said), text
            talk.sample.prompt_ids = ids
        self._ask(number)

    def _go_on(self, number: int, said: list[Message], reward: float | None, done: bool) -> None:
        """Draw another turn, if there is one."""
        talk, most = self._talks[number], self._settings.spec.max_tool_calling_iterations
        self._earned(talk, reward)
        conversation, talk.messages = list(talk.messages), [*talk.messages, *said]
        if done or (most is not None and talk.sample.turns > most):
            self._end(number, "done" if done else "turns")
            return
        turns, kwargs = self._settings.turns_of(talk.kwargs), talk.kwargs
        last = talk.sample.token_ids[-1]
        try:
            ids = turns.tokens(conversation, talk.first, said, kwargs, last)
        except RowProblem as problem:
            self._failed(number, f"the chat template refuses what it said: {problem.detail}")
            return
        except NotExact as error:
            raise self._failure(number, f"the chat template can't take what it said: {error}") from None
        if len(talk.sample.token_ids) + len(ids) >= self._sampling.max_tokens:
            talk.sample.finish = CUT
            self._end(number, "tokens")
            return
        talk.sample.said(ids)
        self._ask(number)

    def _ask(self, number: int) -> None:
        talk = self._talks[number]
        sample, turn = talk.sample, talk.sample.turns
        prompt, asked = hash(tuple(talk.start.token_ids)), talk.asked
        key = hash((prompt, turn)) if turn else prompt
        left = self._sampling.max_tokens - len(sample.token_ids)
        seed = turn_seed(talk.start.seed, turn)
        if asked is not None:
            left = min(left, asked.max_tokens or left)
        self._of_request.append(number)
        tools = None if asked is None else asked.tools or []
        self._ready.append(Request(sample.context, seed, left, key, talk.last_request, tools))

    def _end(self, number: int, reason: str) -> None:
        talk = self._talks[number]
        talk.ended = reason
        if self._settings.kind["rewards"]:
            talk.phase = "end"
            self._process.end(number)
        else:
            self._process.drop(number)

    def _earned(self, talk: _Talk, reward: float | None) -> None:
        if reward is not None:
            before = talk.sample.rewards[-1]
            talk.sample.earned(reward if np.isnan(before) else before + reward)

    def _failed(self, number: int, problem: str) -> None:
        """End a sample whose environment failed.

        Raises:
            RunFailure: nothing stands in for it, or nothing was drawn yet that a reward could be for.
        """
        talk, instead = self._talks[number], self._settings.spec.env_on_error
        if instead == "stop" or talk.phase == "reset":
            raise self._failure(number, problem)
        self._process.drop(number)
        self._earned(talk, instead)
        talk.ended = "error"

    def _failure(self, number: int, problem: str) -> RunFailure:
        from pipeline.rewards.values import shown_value

        talk = self._talks[number]
        shown = "\n".join(f"    {m['role']}: {shown_value(m.get('content'))}" for m in talk.messages[-4:])
        spec = self._settings.spec
        return RunFailure(
            f"{'agent' if spec.agent else 'environment'} '{spec.env_name}'",
            "generate",
            f"{problem}\n{shown}",
            f"mend {spec.user_code[0]}, or set `env_on_error` to the reward that such a step gets",
        )


def _turn(said: Said, turn: int) -> Message:
    """A turn of the policy as a message. Calls are numbered, so that a repeated run has the same ids."""
    message: Message = {"role": "assistant", "content": said.content}
    calls = [
        {
            "id": f"{turn:04d}{i:05d}",
            "type": "function",
            "function": {"name": name if _NAME.fullmatch(name) else "unknown", "arguments": arguments},
        }
        for i, (name, arguments) in enumerate(said.calls)
    ]
    return message | ({"tool_calls": calls} if calls else {})
