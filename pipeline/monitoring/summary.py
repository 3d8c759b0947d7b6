"""Summary at the end of a run: tables of its models, and the start-up time by cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.monitoring.progress import Progress


def results_table(progress: Progress, state: Mapping[str, Any], names: Sequence[str]) -> None:
    """Accuracy of every evaluated model, with its 95 % interval and the seconds of its stage's training, over
    all sessions; `wait` is what the stage waited for processes and weights."""
    rows = []
    for name in names:
        if name not in state["eval"]:
            continue
        result = state["eval"][name]
        low, high = result["ci95"]
        shares = result["metric"] == "exact_match" or 0 <= low <= high <= 1
        show = (lambda v: f"{100 * v:.1f} %") if shares else (lambda v: f"{v:.3f}")
        stage = state["stages"].get(name, {})
        times = [f"{stage[key]:.0f} s" if key in stage else "" for key in ("seconds", "wait")]
        rows.append([name, show(result["accuracy"]), f"{show(low)} - {show(high)}", result["n"], *times])
    if rows:
        columns = ["model", "accuracy", "95 % interval", "prompts", "training", "wait"]
        progress.table("Held-out prompts", columns, rows)
    talks = [(name, talk) for name in names if (talk := state["eval"].get(name, {}).get("conversations"))]
    if talks:
        talked = [
            [
                name,
                f"{talk['reward']['mean']:.3f}" if "reward" in talk else "",
                f"{100 * talk['called']['mean']:.1f} %",
                f"{talk['turns']:.2f}",
            ]
            for name, talk in talks
        ]
        columns = ["model", "environment's reward", "call a tool", "turns"]
        progress.table("Conversations", columns, talked)


def pairs_table(progress: Progress, state: Mapping[str, Any], names: Sequence[str]) -> None:
    """Share of held-out pairs of which each reward model scores the chosen answer higher."""
    rows = []
    for name in names:
        result = state["eval"].get(name)
        if result is not None:
            low, high = (f"{100 * bound:.1f} %" for bound in result["ci95"])
            rows.append([name, f"{100 * result['accuracy']:.1f} %", f"{low} - {high}", result["n"]])
    if rows:
        progress.table("Held-out pairs", ["reward model", "accuracy", "95 % interval", "pairs"], rows)


def say_startup(progress: Progress, startup: Mapping[str, float], total: float) -> None:
    """Print one line: the time until the first step, by cause."""
    first = startup.get("first training step")
    causes = ", ".join(
        f"{name} {value:.1f} s" for name, value in startup.items() if name != "first training step"
    )
    text = f"took {total:.0f} s"
    if first is not None:
        text += f"; first training step after {first:.1f} s ({causes})"
    progress.note(text)
