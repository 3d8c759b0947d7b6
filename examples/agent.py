"""An agent: a stock OpenAI client asks a sum until the answer is right, at most three times.

raylign run examples/agent.yaml
"""

from functools import cache
from typing import Any

from openai import OpenAI

CLIENT = cache(OpenAI)  # One for all samples, which have a key each: to make one takes 20 ms.


def ask_again(prompt: list[Any], answer: str, base_url: str, api_key: str) -> float:
    """Reward of a conversation: the later the answer is right, the less. `prompt`, `answer`: the row's."""
    client, messages = CLIENT(base_url=base_url, api_key="-").with_options(api_key=api_key), list(prompt)
    for tries in (1, 2, 3):
        turn = client.chat.completions.create(model="policy", messages=messages).choices[0].message
        if (turn.content or "").strip() == answer:
            return 1 / tries
        messages += [turn, {"role": "user", "content": f"No. {prompt[-1]['content']}"}]
    return 0.0
