"""A tool that the policy calls: products of two-digit numbers, which the embedded base can't work out itself.

python -m examples.calculator build/calculator     # writes the base and the rows that the run reads
raylign run examples/calculator-sft.yaml
raylign run examples/calculator.yaml

Some demonstrations show how a call is written, most answer off-hand and wrong. That a call is worth it is
left to the reward.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.models.spec import locate_embedded_base

Row = dict[str, Any]

SIZES = {"test": 300, "train": 5000, "prompts": 1000}
"""Rows of each file. Test questions are in no other file; prompts ask what was demonstrated."""
OFF_HAND = 0.6
"""Share of demonstrations without a call."""

CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{% set function = tool.function %}\
{{ function.name }}: {{ function.description }}\
{%- for name, value in function.parameters.properties.items() %} {{ name }}: {{ value.description }}\
{%- endfor %}{% endfor %}\
{{ '<|im_end|>\\n' }}{% endif %}\
{%- for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}\
{{ '<|im_start|>' + message.role + '\\n' }}\
{%- if message.role == 'assistant' %}{% generation %}{{ message.content or '' }}\
{%- for call in message.tool_calls or [] %}{{ '[' + call.function.name + '(' }}\
{%- for name, value in call.function.arguments.items() %}{% if not loop.first %}, {% endif %}\
{{ name }}={{ value | tojson }}{% endfor %}{{ ')]' }}{% endfor %}\
{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}\
{%- endfor %}{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"""
"""The embedded base's template, which also writes tools, and calls in the form that vLLM's `pythonic` parser
reads: `[multiply(a=37, b=45)]`. It is short, which counts where a token is a byte."""


def multiply(a: int, b: int) -> int:
    """
    Multiply.

    Args:
        a: One number.
        b: The other.
    """
    return a * b


def off_hand(a: int, b: int) -> int:
    """A wrong answer: tens by tens and units by units."""
    return a // 10 * (b // 10) * 100 + a % 10 * (b % 10)


def question(a: int, b: int) -> Row:
    return {"role": "user", "content": f"{a}*{b}=?"}


def demonstration(a: int, b: int, calls: bool, tools: Sequence[Row]) -> Row:
    """A conversation that asks the tool and repeats what it says, or one that answers off-hand."""
    if not calls:
        said = [{"role": "assistant", "content": str(off_hand(a, b))}]
        return {"messages": [question(a, b), *said], "tools": tools}
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": a, "b": b}}}
    result = str(multiply(a, b))
    said = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": result},
        {"role": "assistant", "content": result},
    ]
    return {"messages": [question(a, b), *said], "tools": tools}


def rows(seed: int = 0) -> dict[str, list[Row]]:
    """The rows of each file."""
    from transformers.utils import get_json_schema

    rng, tools = random.Random(seed), [get_json_schema(multiply)]
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if off_hand(a, b) != a * b]
    rng.shuffle(pairs)
    test, rest = pairs[: SIZES["test"]], pairs[SIZES["test"] :]
    asked = {frozenset(pair) for pair in test}
    shown = [pair for pair in rest if frozenset(pair) not in asked][: SIZES["train"]]
    made = {
        name: [{"prompt": [question(a, b)], "answer": str(a * b)} for a, b in part]
        for name, part in (("test", test), ("prompts", shown[: SIZES["prompts"]]))
    }
    return made | {"train": [demonstration(a, b, rng.random() >= OFF_HAND, tools) for a, b in shown]}


def write(out: Path) -> None:
    """Write the base with a template that knows tools, and the files of rows."""
    shutil.copytree(locate_embedded_base(), out / "base", dirs_exist_ok=True)
    (out / "base" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, made in rows().items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        print(f"{out / name}.jsonl: {len(made)} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory for the base and the rows")
    write(parser.parse_args().out)
