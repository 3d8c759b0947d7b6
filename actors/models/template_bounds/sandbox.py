"""jinja's sandbox, with the bounds: it counts at every loop, call and operator."""

from __future__ import annotations

from collections.abc import Iterator
from types import BuiltinMethodType
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from actors.models.template_bounds.counting import (
    Filters,
    before_call,
    before_format,
    before_operator,
    built,
    counted,
    entered,
    joined,
    sized,
    tick,
    within,
    written,
)


def _through(name: str, node: Any) -> Any:
    return nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno)


class Bounds(NodeTransformer):
    """Sends through filters what the sandbox can't intercept."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _through("_entered", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        return _through("_joined", nodes.List(node.nodes).set_lineno(node.lineno))

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
        return _through("_built", node)


class BoundedTemplate(Template):
    """A template whose output is counted."""

    def generate(self, *args: Any, **named: Any) -> Iterator[str]:
        return counted(super().generate(*args, **named))


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The sandbox of jinja that transformers takes, with the bounds."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))
    template_class = BoundedTemplate
    concat = staticmethod(written)

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        plain, self.filters = self.filters, Filters()
        for name, function in plain.items():
            self.filters[name] = function
        ours = {"_entered": entered, "_built": built, "_joined": joined}
        # With a context as argument, so that jinja doesn't call them while it compiles.
        self.filters.update({name: pass_context(function) for name, function in ours.items()})
        del self.globals["lipsum"]  # It writes as many words as it is told to.

    def _parse(self, *args: Any) -> nodes.Template:
        tree: nodes.Template = Bounds().visit(super()._parse(*args))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        before_operator(operator, left, right)
        return within(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:
        tick()
        inner = getattr(__obj, "__wrapped__", __obj)
        if getattr(inner, "__name__", None) == "strftime_now":  # transformers' own
            before_format(str(args))
        elif isinstance(inner, BuiltinMethodType):
            args = sized(inner.__name__, args)
            before_call(inner.__name__, inner.__self__, args, named)
        return within(super().call(__context, __obj, *args, **named))
