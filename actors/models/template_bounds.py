"""Bounds on what a chat template may do: a base's template is a program of other people's.

transformers renders templates in jinja's sandbox, which keeps them from files and attributes, but not from
looping for ever or filling the memory. Here the sandbox also counts: processor time at every loop, call and
operator, and the size of every value before and after it is made, so that nothing holds the interpreter for
longer than a few seconds. The text that a template renders is the same.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from threading import local
from types import BuiltinMethodType, GeneratorType
from typing import Any

from actors.errors import UserError

SECONDS = 10.0
"""Processor time that one conversation may take; a long one takes milliseconds."""
SIZE = 2**25
"""Characters that a template may hold in one value, or write."""
PART = 32
"""Characters that each value in a list or mapping counts as, besides its own."""
DIGITS = 100_000
"""Bits of an integer."""
WIDTH = 1_000_000
"""Columns that a text is padded to, or parts that a list is cut into."""

_TOLD = "raylign_template_limit"
"""Attribute of a tokenizer whose template has gone beyond a bound: the message. It is not tried again."""
_now = local()
_WIDTHS = frozenset(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "to_bytes")
)
_LARGE_FIELD = re.compile(r"%[^a-zA-Z%]*(\*|\d{7})|\{[^{}]*:[^{}]*(\{|\d{7})")
"""A field of a format that is a million columns wide, or as wide as one of its values."""
_MANY = 1000
"""Rounds of a loop before which the time is looked at in any case."""


class TemplateLimit(Exception):
    """Raised in a template that goes beyond a bound; its text says which."""


@contextmanager
def bounded(tokenizer: Any) -> Iterator[None]:
    """Render templates of this tokenizer meanwhile, one conversation within the bounds.

    Raises:
        UserError: one goes beyond them; names the tokenizer.
    """
    if (told := getattr(tokenizer, _TOLD, None)) is not None:
        raise UserError(told)
    _install()
    _now.until, _now.weights = time.thread_time() + SECONDS, {}
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
        _now.until = _now.weights = None


@cache
def _install() -> None:
    """Let transformers compile templates for a sandbox that counts."""
    from transformers.utils import chat_template_utils

    chat_template_utils.ImmutableSandboxedEnvironment = _sandbox()


def _tick(rounds: int = 0) -> None:
    """Look at the time now and then; always before many `rounds`."""
    _now.ticks = getattr(_now, "ticks", 0) + 1
    if rounds <= _MANY and _now.ticks & 63:
        return
    until = getattr(_now, "until", None)
    if until is not None and time.thread_time() > until:
        raise TemplateLimit(f"one conversation took it more than {SECONDS:g} s")


def _refuse(size: int) -> None:
    if size > SIZE:
        raise TemplateLimit(f"it makes a value of more than {SIZE:,} characters, or as large a list")


def _within(value: Any) -> Any:
    """The value, within the bounds; of a generator, what it yields will be."""
    kind = type(value)
    if kind is str:
        _refuse(len(value))
    elif kind is int:
        if value.bit_length() > DIGITS:
            raise TemplateLimit(f"it makes a number of more than {DIGITS:,} bits")
    elif isinstance(value, list | tuple | dict):
        _refuse(_weight(value))
    elif kind is GeneratorType:
        return _flow(value)
    return value


def _flow(values: Iterable[Any]) -> Iterator[Any]:
    total = 0
    for value in values:
        _tick()
        total += _weight(value)
        _refuse(total)
        yield value


def _weight(value: Any) -> int:
    """Characters and values in it, as often as it has them: what is written of it is about as long. A list in
    a list twice doubles; each is looked at once, since the sandbox lets none be changed."""
    if isinstance(value, str | bytes):
        return len(value) + PART
    if not isinstance(value, list | tuple | dict):
        return PART
    known: dict[int, tuple[Any, int]] | None = getattr(_now, "weights", None)
    if known is None:
        return len(value) * PART
    if id(value) not in known:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        try:
            known[id(value)] = value, PART + sum(map(_weight, parts))
        except RecursionError:
            raise TemplateLimit("it puts lists in one another without end") from None
    return known[id(value)][1]


def _before_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse an operator whose result would be too large to be made and looked at."""
    if operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length()
            _within(1 << min(bits, DIGITS + 1))
        else:
            many, one = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(many, int):
                _refuse(many * _weight(one))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _within(1 << min(left.bit_length() * max(right, 0), DIGITS + 1))
    elif operator == "+" and not isinstance(left, int | float):
        _refuse(_weight(left) + _weight(right))
    elif operator == "%" and isinstance(left, str):
        _before_format(left)


def _before_format(text: str) -> None:
    if _LARGE_FIELD.search(text):
        raise TemplateLimit("it writes a value in a field of a million columns, or as wide as another value")


def _before_call(name: str, subject: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Refuse a filter, or a method of a text or number, whose result would be too large; `subject` is what it
    is applied to."""
    given = [*args, *named.values()]
    largest = max((abs(value) for value in given if isinstance(value, int)), default=0)
    if name in _WIDTHS:
        lines = 1 + subject.count("\n") + subject.count("\t") if isinstance(subject, str) else 1
        if largest > WIDTH or largest * lines > SIZE:
            raise TemplateLimit(f"it makes something {largest:,} wide")
    elif name == "tojson":
        if largest > 100:
            raise TemplateLimit(f"it indents by {largest:,}")
    elif name == "join":  # A text's method and the filter: each has the other's two sides.
        parts = [value for value in (subject, *given[:1]) if hasattr(value, "__len__")]
        longest = max(map(len, parts), default=0)
        _refuse(sum(map(_weight, parts)) + longest * min(map(len, parts)) if len(parts) > 1 else longest)
    elif name == "sum" and any(isinstance(value, list | tuple) for value in given):
        _refuse(_weight(subject) * len(subject))  # Each step makes a longer list.
    elif name == "strftime":
        _before_format(str(given[:1]))
    elif not isinstance(subject, str):
        return
    elif name == "replace" and len(given) > 1:
        old, new = named.get("old", given[0]), named.get("new", given[-1] if "new" in named else given[1])
        _refuse(len(subject) + subject.count(str(old)) * len(str(new)))
    elif name in ("wordwrap", "urlize", "translate"):
        _refuse(len(subject) * max(map(_weight, given), default=1))
    elif name in ("format", "format_map"):
        _before_format(subject)


def _sized(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with lists in place of generators, where their length decides on the result's."""
    if name not in ("join", "sum"):
        return args
    return tuple(list(arg) if type(arg) is GeneratorType else arg for arg in args)


class Filters(dict[str, Callable[..., Any]]):
    """Filters of jinja's and transformers', each within the bounds."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # Of some the first is their surroundings.

        @wraps(function)
        def within(*args: Any, **named: Any) -> Any:
            _tick()
            args = _sized(name, args)
            _before_call(name, args[first] if len(args) > first else None, args[first + 1 :], named)
            return _within(function(*args, **named))

        super().__setitem__(name, within)


def _entered(context: Any, values: Any) -> Any:
    """What a loop goes over; the time is looked at before it begins."""
    _tick(len(values) if hasattr(values, "__len__") else 0)
    return values


def _built(context: Any, value: Any) -> Any:
    return _within(value)


def _joined(context: Any, values: list[Any]) -> str:
    _refuse(sum(map(_weight, values)))
    return "".join(map(str, values))


def _written(pieces: Iterable[str]) -> str:
    """All that a template or a macro of it writes."""
    return "".join(_counted(pieces))


def _counted(pieces: Iterable[str]) -> Iterator[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > SIZE:
            raise TemplateLimit(f"it writes more than {SIZE:,} characters")
        yield piece


@cache
def _sandbox() -> type:
    """The sandbox of jinja that transformers takes, with the bounds."""
    from jinja2 import Template, nodes, pass_context
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    def through(name: str, node: Any) -> Any:
        return nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno)

    class Bounds(NodeTransformer):
        """Sends through filters what the sandbox can't intercept."""

        def visit_For(self, node: nodes.For) -> nodes.For:
            self.generic_visit(node)
            node.iter = through("_entered", node.iter)
            return node

        def visit_Concat(self, node: nodes.Concat) -> Any:
            self.generic_visit(node)
            return through("_joined", nodes.List(node.nodes).set_lineno(node.lineno))

        def visit_List(self, node: nodes.List) -> Any:
            return self._made(node)

        def visit_Dict(self, node: nodes.Dict) -> Any:
            return self._made(node)

        def visit_Tuple(self, node: nodes.Tuple) -> Any:
            return self._made(node) if node.ctx == "load" else node

        def _made(self, node: Any) -> Any:
            self.generic_visit(node)
            if all(isinstance(part, nodes.Const) for part in node.iter_child_nodes()):
                return node
            return through("_built", node)

    class BoundedTemplate(Template):
        def generate(self, *args: Any, **named: Any) -> Iterator[str]:
            return _counted(super().generate(*args, **named))

    class BoundedSandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "+", "%"))
        template_class = BoundedTemplate
        concat = staticmethod(_written)

        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            plain, self.filters = self.filters, Filters()
            for name, function in plain.items():
                self.filters[name] = function
            ours = {"_entered": _entered, "_built": _built, "_joined": _joined}
            # With a context as argument, so that jinja doesn't call them while it compiles.
            self.filters.update({name: pass_context(function) for name, function in ours.items()})
            del self.globals["lipsum"]  # It writes as many words as it is told to.

        def _parse(self, *args: Any) -> nodes.Template:
            tree: nodes.Template = Bounds().visit(super()._parse(*args))
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _before_operator(operator, left, right)
            return _within(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:
            _tick()
            inner = getattr(__obj, "__wrapped__", __obj)
            if getattr(inner, "__name__", None) == "strftime_now":  # transformers' own
                _before_format(str(args))
            elif isinstance(inner, BuiltinMethodType):
                args = _sized(inner.__name__, args)
                _before_call(inner.__name__, inner.__self__, args, named)
            return _within(super().call(__context, __obj, *args, **named))

    return BoundedSandbox
