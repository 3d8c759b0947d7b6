"""Chat templates that loop, recurse or make gigabytes are ended; all others render what they did."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trl
from jinja2.sandbox import ImmutableSandboxedEnvironment

from actors.errors import UserError
from actors.models.template_bounds import counting
from actors.models.template_bounds.bounded import bounded
from actors.models.turn_ends import turn_ends
from pipeline.cli.chat_loop import question
from pipeline.data.tokens.tokenize import tokenize
from tests.pipeline.data.tokens.one_row import CHATML, assistant, records, tokenizer_with, user

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4, I think."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
]
TEN = "[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]"


def doubled(expression: str) -> str:
    return (
        "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = "
        f"{expression} %}}{{% endfor %}}{{{{ ns.x }}}}"
    )


ENDED = {
    "loops in loops": "{% for a in range(90000) %}" * 3 + "{% endfor %}" * 3,
    "loops over lists that never change": f"{{% for a in {TEN} %}}" * 14 + "{% endfor %}" * 14,
    "loops in a macro": "{% macro m() %}"
    + "{% for a in range(90000) %}" * 3
    + "{% endfor %}" * 3
    + "{% endmacro %}{{ m() }}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters that go over much": "{% for i in range(99999) %}"
    "{{ range(99999) | select('odd') | list | length }}{% endfor %}",
    "much text": "{% for a in range(90000) %}{% for b in range(90000) %}" + "a" * 99 + "{% endfor %}" * 2,
    "much text of a macro": "{% macro m() %}{% for a in range(90000) %}"
    + "a" * 999
    + "{% endfor %}{% endmacro %}{{ m() }}",
    "text times a number": "{{ 'a' * 10**9 }}",
    "a list times a number": "{{ ([1] * 10**9) | length }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "squares": doubled("ns.x | length * 10 ** 99999"),
    "text and itself": doubled("ns.x ~ ns.x"),
    "text plus itself": doubled("ns.x + ns.x"),
    "a list of itself twice": doubled("[ns.x, ns.x]"),
    "a mapping of itself twice": doubled("{'a': ns.x, 'b': ns.x}"),
    "a called mapping of itself twice": doubled("dict(a=ns.x, b=ns.x)"),
    "a block of itself twice": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "padding by a filter": "{{ 'a' | center(10000000000) }}",
    "padding by a block": "{% filter center(10000000000) %}a{% endfilter %}",
    "padding by a method": "{{ 'a'.ljust(10000000000) }}",
    "a format": "{{ '%9999999999d' % 1 }}",
    "a format as wide as a value": "{{ '%*d' % (9999999999, 1) }}",
    "a format in braces": "{{ '{:9999999999}'.format(1) }}",
    "a format in braces as wide as a value": "{{ '{:{w}}'.format(1, w=9999999999) }}",
    "a date": "{{ strftime_now('%9999999999Y') }}",
    "replacing": "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "replacing by a filter": "{% set x = 'a' * 1000000 %}{{ x | replace('', x) }}",
    "joining": "{% set x = 'a' * 1000000 %}{{ x.join(x) }}",
    "joining what is made meanwhile": "{{ range(99999) | map('string') | map('center', 999999) | join }}",
    "joining with much": "{% set x = 'a' * 1000000 %}{{ range(99999) | map('string') | join(x) }}",
    "indenting": "{{ ('\\n' * 1000000) | indent(1000000) }}",
    "indenting JSON": "{{ ([1] * 100000) | tojson(indent=1000000) }}",
    "adding lists up": "{{ ([[1] * 30] * 30000) | sum(start=[]) | length }}",
}  # fmt: skip


@pytest.mark.parametrize("how", ENDED)
def test_a_template_that_goes_beyond_a_bound_is_ended_and_named(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "SECONDS", 0.3)
    tokenizer = tokenizer_with(ENDED[how])
    tokenizer.name_or_path = "org/loops"
    begun = time.process_time()
    for _ in range(2):  # The second time it is known.
        with pytest.raises(UserError) as raised:
            turn_ends(tokenizer)
        assert str(raised.value).startswith("the chat template of org/loops was ended, since ")
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    "use",
    [
        lambda tokenizer: tokenize(records([user("Rain?")], [assistant("Yes.")]), tokenizer),
        lambda tokenizer: question(tokenizer, [user("Rain?")]),
    ],
)
def test_rows_and_chats_that_a_template_loops_over_end_in_the_message(
    use: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "SECONDS", 0.3)
    looping = "{% if messages[0].content == 'Rain?' %}" + ENDED["loops in loops"] + "{% endif %}" + CHATML
    tokenizer = tokenizer_with(looping)
    turn_ends(tokenizer)
    with pytest.raises(UserError, match=r"was ended, since one conversation took it more than 0\.3 s"):
        use(tokenizer)


def test_every_template_of_trl_renders_the_same_text_with_bounds_as_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.utils import chat_template_utils

    with bounded(None):
        sandbox = chat_template_utils.ImmutableSandboxedEnvironment
    assert sandbox is not ImmutableSandboxedEnvironment

    def rendered(name: str, environment: type, given: dict[str, Any], marks: bool) -> Any:
        monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", environment)
        template = f"{{# {environment.__name__} #}}{name}"  # Compiled templates are kept by their text.
        variables = {"bos_token": "<s>", "strftime_now": datetime(2026, 1, 2).strftime}
        try:
            return chat_template_utils.render_jinja_template(
                chat_template=template, return_assistant_tokens_mask=marks, **variables, **given
            )
        except Exception as error:
            return type(error), str(error)

    found = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    texts = 0
    for file in found:
        template = file.read_text()
        for given in (
            {"conversations": [CHAT]},
            {"conversations": [CHAT[1:]], "tools": TOOLS},
            {"conversations": [CHAT[1:4]], "add_generation_prompt": True, "enable_thinking": False},
        ):
            plain, mine = (
                rendered(template, environment, given, "{% generation" in template)
                for environment in (ImmutableSandboxedEnvironment, sandbox)
            )
            if isinstance(plain[0], list):
                texts += 1
                marks = [len(plain[1]), len(mine[1])]
                assert mine == (plain[0], plain[1]), (file.name, marks)
            else:
                assert mine == plain, file.name
    assert texts > 100
