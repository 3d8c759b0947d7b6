"""Progress of a run: one live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text
from pipeline.monitoring.formatting import MARKS, duration
from pipeline.monitoring.phases import shown_by

PLAIN_SECONDS = 5.0
"""Without a terminal, the least time between two lines of one stage: readable in a job's log."""

WORTH_SAYING_S = 0.5
"""Seconds since the start from which a line of a phase tells them."""

SHOWN = (
    ("loss", "loss {:.3f}"),
    ("accuracy", "accuracy {:.0%}"),
    ("rewards/accuracies", "reward acc {:.0%}"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
)
"""Metrics shown after the step: key, format. The others are in metrics.jsonl."""

SHOWN_ONLINE = (
    ("reward", "reward {:.3f}"),
    ("kl", "kl {:.4f}"),
    ("completions/mean_length", "length {:.1f}"),
    ("time/step", "{:.1f} s/step"),
)
"""Those of a stage that generates what it trains on. Its loss says nothing: it starts at 0 every step."""

COLOURS = {"done": "green", "skipped": "cyan", "failed": "red", "stopped": "yellow"}


@dataclass
class StageClock:
    """Progress of one stage. Times in seconds of the clock that `Progress` was given."""

    name: str
    total: int | None
    started: float
    first_step: int | None = None
    """The step that this process began from: a resumed stage does not count what it did before."""
    first_time: float = 0.0
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def advance(self, step: int, metrics: Mapping[str, float], now: float) -> None:
        """Take in `step` steps done, and keep the latest value of each metric."""
        if self.first_step is None:
            self.first_step, self.first_time = step, now
        self.step = step
        self.metrics.update(metrics)

    def seconds_left(self, now: float) -> float | None:
        """Time left at the mean speed since the first step seen; None before there is one."""
        if self.total is None or self.first_step is None or self.step <= self.first_step:
            return None
        per_step = (now - self.first_time) / (self.step - self.first_step)
        return max(0.0, per_step * (self.total - self.step))

    def parts(self, now: float, *, finished: bool = False) -> list[str]:
        """The facts of the stage as short texts, in the order in which they are printed."""
        parts: list[str] = []
        if self.total is not None or self.step:
            parts.append(f"step {self.step}" + ("" if self.total is None else f"/{self.total}"))
        shown = SHOWN_ONLINE if "completions/mean_length" in self.metrics else SHOWN
        parts += [form.format(self.metrics[key]) for key, form in shown if key in self.metrics]
        left = self.seconds_left(now)
        if finished or left is None:
            parts.append(duration(now - self.started))
        else:
            parts.append(f"{duration(left)} left")
        return parts


class Progress:
    """Live progress of a run; a context manager.

    >>> with Progress() as progress:
    ...     progress.stage("sft", total=150)
    ...     progress.step(1, {"loss": 2.31, "tokens_per_second": 9800})
    ...     progress.done()

    On a terminal the running stage's line is redrawn in place. Elsewhere a stage prints its first step, one
    line every `PLAIN_SECONDS`, and its end.
    """

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from pipeline.monitoring.console import console_for

        self.console = console or console_for(stderr=False, lasting=True)
        self.live = self.console.is_terminal
        self._clock = clock
        self._current: StageClock | None = None
        self._printed_at = float("-inf")
        self._display: Live | None = None
        self._phase = self._count = ""
        self._began = self._phase_began = self._counted = clock()
        self._heard = ExitStack()

    def __enter__(self) -> Progress:
        self._heard.enter_context(shown_by(self))
        if self.live:
            from rich.live import Live

            # rich redraws from its own thread, so the clock keeps ticking during a long step.
            self._display = Live(
                console=self.console, get_renderable=self._render, refresh_per_second=4, transient=True
            )
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._current is not None:
            self.done("failed" if kind is not None else "done")
        self._heard.close()
        self._phase = ""
        if self._display is not None:
            self._display.stop()
            self._display = None

    def phase(self, text: str) -> None:
        """Say what is being done where there is no step to show: live with its seconds, else in one line."""
        if text == self._phase:
            return
        self._phase, self._count = text, ""
        self._phase_began = self._counted = self._clock()
        if not self.live and text:
            self._print_phase(text)

    def count(self, text: str) -> None:
        """Say how far a phase is; without a terminal, every `PLAIN_SECONDS` at most."""
        self._count, now = text, self._clock()
        if not self.live and now - self._counted >= PLAIN_SECONDS:
            self._counted = now
            self._print_phase(f"{self._phase}: {text}" if self._phase else text)

    def _print_phase(self, text: str) -> None:
        passed = self._clock() - self._began
        self.note(f"· {text}" + (f" (after {duration(passed)})" if passed >= WORTH_SAYING_S else ""))

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin a stage of `total` steps (None: of unknown length); the one before is done."""
        if self._current is not None:
            self.done()
        self._current = StageClock(name, total, started=self._clock())
        self._printed_at = float("-inf")
        if not self.live:
            self._print_plain(MARKS["running"], [f"{total} step{'s' * (total != 1)}" if total else "started"])

    def step(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Report that `step` steps are done, with the latest metrics under their TRL names."""
        current = self._require_stage()
        now = self._clock()
        self._phase = ""
        current.advance(step, metrics or {}, now)
        if self.live:
            return
        if now - self._printed_at >= PLAIN_SECONDS:
            self._print_plain(MARKS["running"], current.parts(now))
            self._printed_at = now

    def done(self, state: str = "done", text: str = "") -> None:
        """End the current stage as `done`, `skipped`, `failed` or `stopped`; `text` says why."""
        current = self._require_stage()
        self._current = None
        if self._display is not None:
            # Otherwise the stage's last live line is left on the screen, below its end, until the next one.
            self._display.refresh()
        parts = current.parts(self._clock(), finished=True)
        if state == "skipped":
            parts = []
        self._print_plain(
            MARKS.get(state, "·"), [state if state != "done" else "", text, *parts], current, state
        )

    def note(self, text: str, style: str = "") -> None:
        """Print one line above the live line; markup in `text` is not interpreted."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table: the first column to the left, the others to the right."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table: Table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*[Text(str(cell)) for cell in row])
        self.console.print(table)

    def _require_stage(self) -> StageClock:
        if self._current is None:
            raise RuntimeError("progress has no stage: call stage(name, total) first")
        return self._current

    def _print_plain(
        self, mark: str, parts: Sequence[str], stage: StageClock | None = None, state: str = ""
    ) -> None:
        from rich.text import Text

        stage = stage or self._require_stage()
        line = Text()
        line.append(f"{mark} ", style=COLOURS.get(state, ""))
        line.append(stage.name, style="bold")
        line.append("  " + " · ".join(part for part in parts if part))
        self.console.print(line, soft_wrap=True, highlight=False)

    def _render(self) -> Table | Text:
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.text import Text

        current, now, phase = self._current, self._clock(), self._phase
        if current is None and not phase:
            return Text("")
        cells: list[object] = [Spinner("dots", style="cyan")]
        if current is not None:
            cells.append(Text(current.name, style="bold"))
        if phase or current is None:
            text = " · ".join(
                part for part in (phase, self._count, duration(now - self._phase_began)) if part
            )
            cells.append(Text(text, overflow="ellipsis", no_wrap=True))
            return self._line(cells)
        if current.total:
            cells.append(ProgressBar(total=current.total, completed=current.step, width=24))
        cells.append(Text(" · ".join(current.parts(now)), overflow="ellipsis", no_wrap=True))
        return self._line(cells)

    @staticmethod
    def _line(cells: Sequence[object]) -> Table:
        from rich.table import Table

        grid = Table.grid(padding=(0, 1))
        grid.add_row(*cells)  # type: ignore[arg-type]
        return grid


@contextmanager
def working(text: str) -> Iterator[None]:
    """Say on standard error what a command is doing until it has something to show: live on a terminal."""
    from pipeline.monitoring.console import err

    with Progress(err) as progress:
        progress.phase(text)
        yield
