"""Conversations with the environments of `worlds.py`, by a policy that is a function of text and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from actors.batches import Generations, Said, SamplingSpec
from actors.models.turn_ends import turn_ends
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.tokens.prompts import PromptData
from pipeline.environments.episodes import Episodes
from pipeline.environments.playing import Player
from pipeline.environments.prepared import conversing, describe
from pipeline.environments.spec import TurnSettings
from tests.pipeline.data.tokens.one_row import CHATML, tokenizer_with

HERE = "tests.pipeline.environments.worlds"
PROMPT = [{"role": "user", "content": "Guess."}]
TOKENIZER = tokenizer_with(CHATML)
END = turn_ends(TOKENIZER).turn[0]
TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Speak = Callable[[str, int], str]
"""Text of the conversation so far and seed -> the policy's turn."""
Parse = Callable[[str], Said] | None


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def digit(text: str, seed: int) -> str:
    """A policy whose turn is a function of context and seed alone, as an engine's is."""
    return str(int.from_bytes(hashlib.blake2b(f"{text}{seed}".encode(), digest_size=2).digest()) % 10)


@contextmanager
def template_of_tools() -> Iterator[None]:
    """Let the tokenizer write tools and their calls meanwhile."""
    TOKENIZER.chat_template = TOOLS
    try:
        yield
    finally:
        TOKENIZER.chat_template = CHATML


class SpeakingPool:
    """Stands in for a pool of engines: draws the turns that are asked for in a random order, some at a
    time."""

    def __init__(self, speak: Speak = digit, order: int = 0, parse: Parse = None) -> None:
        self.speak, self.order, self.parse = speak, order, parse

    def converse(self, conversation: Episodes, sampling: SamplingSpec) -> float:
        queue: list[tuple[int, Any]] = []
        number, rng = 0, np.random.default_rng(self.order)
        while conversation.waits() or queue:
            for request in conversation.requests(0.0 if queue else 1.0):
                queue.append((number, request))
                number += 1
            taken = [queue.pop(rng.integers(len(queue))) for _ in range(min(len(queue), rng.integers(1, 4)))]
            if not taken:
                continue
            drawn = []
            for _, request in taken:
                said = [*ids_of(self.speak(TOKENIZER.decode(request.prompt), request.seed)), END]
                reason = "stop" if len(said) <= request.max_tokens else "length"
                said = said[: request.max_tokens]
                drawn.append((said, [-0.25] * len(said), reason))
            found = Generations.of(drawn, 1, "m", 0.0, 3)
            texts = found.texts(TOKENIZER, [], [END])
            parsed = [self.parse(one) for one in texts] if self.parse else None
            conversation.drew([n for n, _ in taken], found, parsed)
        return 0.5


def play(
    speak: Speak = digit,
    samples: int = 6,
    *,
    order: int = 0,
    limit: int = 400,
    parse: Parse = None,
    **settings: Any,
) -> Generations:
    """Conversations of so many samples, two to a prompt."""
    settings.setdefault("env", f"{HERE}:Guess")
    spec = TurnSettings(**settings)
    kind = describe(spec, "stages.grpo")
    kwargs = {"tools": kind["tools"]} if kind["tools"] else {}
    made = conversing(spec, kind, TOKENIZER, [kwargs], [END], room=600)
    text, ids = made.turns_of(kwargs).beginning(PROMPT, kwargs)
    data = PromptData([PROMPT], [text], [ids], {"start": [3]}, Skipped(), "", [PROMPT], [kwargs])
    return Player(made, TOKENIZER).play(
        SpeakingPool(speak, order, parse),  # type: ignore[arg-type]
        data.select([0], copies=samples),
        SamplingSpec(max_tokens=limit, stop_token_ids=[END], n=2),
        [100 + i for i in range(samples)],
        [7 + i // 2 for i in range(samples)],
    )
