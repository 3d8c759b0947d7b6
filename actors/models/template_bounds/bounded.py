"""Rendering of chat templates within bounds.

transformers renders templates in jinja's sandbox, which keeps them from files and attributes, but not from
looping for ever or filling the memory. Here the sandbox also counts: processor time at every loop, call and
operator, and the size of every value before and after it is made, so that nothing holds the interpreter for
longer than a few seconds. The text that a template renders is the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from actors.errors import UserError
from actors.models.template_bounds import counting
from actors.models.template_bounds.counting import TemplateLimit, now

_TOLD = "raylign_template_limit"
"""Attribute of a tokenizer whose template has gone beyond a bound: the message. It is not tried again."""


@contextmanager
def bounded(tokenizer: Any) -> Iterator[None]:
    """Render templates of this tokenizer meanwhile, one conversation within the bounds.

    Raises:
        UserError: one goes beyond them; names the tokenizer.
    """
    if (told := getattr(tokenizer, _TOLD, None)) is not None:
        raise UserError(told)
    _install()
    now.until, now.weights = time.thread_time() + counting.SECONDS, {}
    try:
        yield
    except TemplateLimit as limit:
        name = getattr(tokenizer, "name_or_path", "") or "the base"
        told = (
            f"the chat template of {name} was ended, since {limit}. Correct chat_template.jinja, or take "
            "another base: a template that loops or fills the memory is not to be trusted"
        )
        setattr(tokenizer, _TOLD, told)
        raise UserError(told) from None
    finally:
        now.until = now.weights = None


@cache
def _install() -> None:
    """Let transformers compile templates for a sandbox that counts."""
    from transformers.utils import chat_template_utils

    from actors.models.template_bounds.sandbox import BoundedSandbox

    chat_template_utils.ImmutableSandboxedEnvironment = BoundedSandbox
