"""Text in which nothing acts on the terminal, for all that is printed.

Rows of data and samples of a model are other people's text. A terminal obeys escape codes in them: they clear
the screen, hide or rewrite lines, set the title, fill the clipboard. The one place that keeps them out is
here; consoles and job output go through it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, those that turn the direction of text, and half surrogate pairs,
which have no form in UTF-8."""
_COLOUR = re.compile("\x1b\\[[0-9;:]*m")


def printable(text: str) -> str:
    r"""Text as it is, with each character that acts on a terminal shown instead: `\x1b[2J`."""
    return _ACTING.sub(_shown, text)


def printable_log(text: str) -> str:
    """As `printable`, of another process's output: its colours and redrawn lines become plain lines."""
    plain = _COLOUR.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return printable(plain)


class PrintableConsole(Console):
    """A console whose own colours and cursor work, and on which text can't do either."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything printed passes here, in pieces: text, or (`control`) what rich itself asks for."""
        for segment in super().render(renderable, options):
            if segment.control is None and _ACTING.search(segment.text):
                yield Segment(printable(segment.text), segment.style)
            else:
                yield segment


class PrintableOutput:
    """A text file in front of another one, for writers that know no console."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, text: str) -> int:
        """Write what is printable of `text`; its length, as a file does."""
        self._out.write(printable_log(text))
        return len(text)

    def flush(self) -> None:
        self._out.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


@contextmanager
def printable_stdout() -> Iterator[None]:
    """Let standard output be printable meanwhile."""
    import sys

    with redirect_stdout(PrintableOutput(sys.stdout)):
        yield


def _shown(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
