"""A judge that the run serves itself: vLLM engines with a model of its own, asked as an endpoint is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from actors.batches import SamplingSpec
from actors.errors import RunFailure
from pipeline.rewards.http_requests import Reply

if TYPE_CHECKING:
    from actors.models.turn_ends import TurnEnds
    from actors.rollout.pool import RolloutPool


class JudgeEngines:
    """The engines of `roles.judge`, which hold the judge's weights; several rewards may ask them."""

    def __init__(self, pool: RolloutPool, tokenizer: Any, ends: TurnEnds, positions: int, where: str) -> None:
        """`tokenizer`, `ends`: the judge's own; `positions`: of question and answer in an engine; `where`:
        the model with the digest of its weights."""
        self.where = where
        self._pool, self._tokenizer, self._ends, self._positions = pool, tokenizer, ends, positions
        self._turn = threading.Lock()

    def ask(self, bodies: Sequence[Any], timeout_s: float) -> Answers:
        """Let the engines answer chat completions, which have one `max_tokens`."""
        return Answers(lambda: self._answered(bodies), len(bodies), timeout_s)

    def _answered(self, bodies: Sequence[Any]) -> list[Reply]:
        limit = bodies[0]["max_tokens"]
        asked = SamplingSpec(temperature=0.0, max_tokens=limit)
        sampling = self._ends.sampling(asked, self._tokenizer, "judge")
        questions = [self._token_ids(body) for body in bodies]
        fits = [i for i, ids in enumerate(questions) if len(ids) + limit <= self._positions]
        replies = [
            Reply(
                problem=f"the question has {len(ids)} tokens and the answer up to {limit}, and an engine of "
                f"the judge holds {self._positions} (roles.judge.engine.max_model_len)"
            )
            for ids in questions
        ]
        with self._turn:
            found = self._pool.generate([questions[i] for i in fits], sampling, [0] * len(fits))
        for i, text in zip(
            fits, found.texts(self._tokenizer, sampling.stop, sampling.stop_token_ids), strict=True
        ):
            replies[i] = Reply({"choices": [{"message": {"role": "assistant", "content": text}}]})
        return replies

    def _token_ids(self, body: Any) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            body["messages"],
            tokenize=False,
            add_generation_prompt=True,
            **body.get("chat_template_kwargs", {}),
        )
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


class Answers:
    """Answers under way in a thread of their own; nobody waits for them beyond their deadline."""

    def __init__(self, work: Callable[[], list[Reply]], n: int, timeout_s: float) -> None:
        self._work, self._n, self._timeout_s = work, n, timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._found: list[Reply] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="judge")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self._work()
        except RunFailure as failure:
            self._found = [Reply(problem=str(failure))] * self._n
        except Exception as error:  # a template of the judge's may fail in any way
            self._found = [Reply(problem=f"{type(error).__name__}: {error}")] * self._n

    def result(self) -> list[Reply]:
        """A reply to each, at the deadline at the latest."""
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        return self._found or [Reply(problem=f"no answer within {self._timeout_s:g} s")] * self._n
