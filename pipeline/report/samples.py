"""Chooses generations to show side by side: the same prompt, answered by each model. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.report.tolerant_reading import as_number

SHOWN_PER_CHANGE = {"better": 4, "worse": 2, "same": 4}
"""Prompts shown per kind of change from the first model to the last. Losses are always among them."""

STEPS_SHOWN, PROMPTS_SHOWN, ANSWERS_SHOWN, SINGLES_SHOWN = 5, 2, 4, 4
"""Of an online stage: steps from first to last, prompts of each, answers to each prompt; and prompts of each
step where a prompt has one answer."""

TEXT_LIMIT = 1200
"""Characters of one text; a longer one is cut, and says by how much."""


SHORT_PROMPT = 40
"""Characters up to which a prompt is shown left of its answers instead of above them."""


@dataclass(frozen=True)
class Answer:
    """One model's answer. `verdict` is right, wrong, or empty where there is no score of 0 or 1."""

    label: str
    text: str
    score: float | None
    verdict: str


@dataclass
class Sample:
    """One prompt with its expected answer (may be empty) and the answers given."""

    prompt: str
    expected: str
    answers: list[Answer] = field(default_factory=list)

    @property
    def short(self) -> bool:
        """True where prompt and expected answer fit left of the answers."""
        return len(self.prompt) <= SHORT_PROMPT and len(self.expected) <= SHORT_PROMPT

    @property
    def change(self) -> str:
        """better, worse or same: the last answer's score against the first one's."""
        scores = [answer.score for answer in self.answers if answer.score is not None]
        if len(scores) < 2 or scores[0] == scores[-1]:
            return "same"
        return "better" if scores[-1] > scores[0] else "worse"


@dataclass(frozen=True)
class Side:
    """Samples side by side: the labels of the columns, the rows shown, and how many there were."""

    labels: list[str]
    samples: list[Sample]
    total: int
    counts: dict[str, int]
    """Number of the `total` that got better, got worse, or are the same."""


def side_by_side(completions: Mapping[str, Sequence[Mapping[str, Any]]]) -> Side:
    """Join each model's rows {prompt, completion, answer, score} on the prompt, and choose which to show."""
    samples: dict[str, Sample] = {}
    asked = frame({as_text(row.get("prompt")) for rows in completions.values() for row in rows})
    for label, rows in completions.items():
        for row in rows:
            prompt = as_text(row.get("prompt"))
            sample = samples.setdefault(
                prompt, Sample(clip(asked.inside(prompt)), clip(as_text(row.get("answer"))))
            )
            if not any(answer.label == label for answer in sample.answers):
                sample.answers.append(to_answer(label, row))
    labels = list(completions)
    whole = [sample for sample in samples.values() if len(sample.answers) == len(labels)]
    # Models evaluated on different prompts have nothing to show side by side: take what there is.
    whole = whole or list(samples.values())
    counts = {change: sum(sample.change == change for sample in whole) for change in SHOWN_PER_CHANGE}
    return Side(labels, choose(whole), len(whole), counts)


@dataclass(frozen=True)
class StepSamples:
    """Some of what an online stage generated in one step. `reward`: the step's mean, if it was logged;
    `total`: prompts of which samples were kept."""

    step: int
    reward: float | None
    total: int
    samples: list[Sample]

    @property
    def singles(self) -> bool:
        """True where each prompt has one answer: these fit a line each."""
        return all(len(sample.answers) == 1 for sample in self.samples)


def samples_by_step(rows: Sequence[Mapping[str, Any]], rewards: Mapping[int, float]) -> list[StepSamples]:
    """Samples {step, prompt, completion, reward, answer} of a few steps, evenly from first to last.

    `rewards`: mean of each step over all of its samples, of which the rows may be a few.
    """
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        step = as_number(row.get("step"))
        if step is not None and "completion" in row:
            by_step.setdefault(int(step), []).append(row)
    steps = sorted(by_step)
    last, shown = len(steps) - 1, min(STEPS_SHOWN, len(steps))
    chosen = [steps[round(at * last / max(1, shown - 1))] for at in range(shown)]
    asked = frame({as_text(row.get("prompt")) for rows in by_step.values() for row in rows})
    return [_step_samples(step, by_step[step], rewards.get(step), asked) for step in chosen]


def _step_samples(
    step: int, rows: Sequence[Mapping[str, Any]], reward: float | None, asked: Frame
) -> StepSamples:
    """Prompts with answers of different rewards first: the others taught the policy nothing."""
    samples: dict[str, Sample] = {}
    for row in rows:
        prompt = as_text(row.get("prompt"))
        sample = samples.setdefault(
            prompt, Sample(clip(asked.inside(prompt)), clip(as_text(row.get("answer"))))
        )
        sample.answers.append(
            Answer("reward", clip(as_text(row["completion"])), as_number(row.get("reward")), "")
        )
    alone = all(len(sample.answers) == 1 for sample in samples.values())
    limit = SINGLES_SHOWN if alone else PROMPTS_SHOWN
    found = sorted(samples.values(), key=lambda sample: -_spread(sample))[:limit]
    return StepSamples(step, reward, len(samples), [_extremes(sample) for sample in found])


def _spread(sample: Sample) -> float:
    scores = [answer.score for answer in sample.answers if answer.score is not None]
    return max(scores) - min(scores) if scores else 0.0


def _extremes(sample: Sample) -> Sample:
    """At most ANSWERS_SHOWN answers, the best and the worst among them, best first."""
    ranked = sorted(
        sample.answers, key=lambda answer: -(answer.score if answer.score is not None else -math.inf)
    )
    half = ANSWERS_SHOWN // 2
    kept = ranked if len(ranked) <= ANSWERS_SHOWN else ranked[:half] + ranked[-half:]
    return replace(sample, answers=kept)


def stage_samples(rows: Sequence[Mapping[str, Any]]) -> Side:
    """A stage's samples.jsonl: one row a prompt with `before` and `after`, or one row a generation,
    told apart by `when` or `model`. Those of a stage that names steps: `samples_by_step`."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for label in ("before", "after"):
            if label in row:
                score = row.get(f"score_{label}", row.get(f"{label}_score"))
                by_label.setdefault(label, []).append({**row, "completion": row[label], "score": score})
        if "before" not in row and "after" not in row:
            label = str(row.get("when") or row.get("model") or "generation")
            by_label.setdefault(label, []).append(dict(row))
    return side_by_side(by_label)


def choose(samples: Sequence[Sample]) -> list[Sample]:
    """Some of each kind of change, better ones first; within a kind the first that came."""
    chosen: list[Sample] = []
    for change, limit in SHOWN_PER_CHANGE.items():
        chosen += [sample for sample in samples if sample.change == change][:limit]
    return chosen


def to_answer(label: str, row: Mapping[str, Any]) -> Answer:
    """One row of a generations file as an answer."""
    raw = row.get("score")
    score = as_number(int(raw) if isinstance(raw, bool) else raw)
    verdict = {0.0: "wrong", 1.0: "right"}.get(score, "") if score is not None else ""
    return Answer(label, clip(as_text(row.get("completion"))), score, verdict)


def _shared_start(texts: Sequence[str]) -> str:
    low, high = min(texts), max(texts)
    same = next((at for at, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    return low[:same]


@dataclass(frozen=True)
class Frame:
    """Text that a chat template puts before and after every prompt."""

    head: str = ""
    tail: str = ""

    def inside(self, prompt: str) -> str:
        """The prompt without its frame."""
        return prompt.removeprefix(self.head).removesuffix(self.tail) or prompt


def frame(prompts: Iterable[str]) -> Frame:
    """The markers (`<|im_start|>user` and their like) that all of several prompts begin and end with.

    Text that they share but that is no marker is kept: it is part of the question.
    """
    texts = list(prompts)
    if len(texts) < 2:
        return Frame()
    head = _shared_start(texts)
    tail = _shared_start([text[::-1] for text in texts])[::-1]
    markers = list(re.finditer(r"<\|[^|\n]*\|>[^\n<]*\n+", head))
    marker = tail.find("<|")
    return Frame(head[: markers[-1].end()] if markers else "", tail[marker:] if marker >= 0 else "")


def as_text(value: Any) -> str:
    """A prompt or completion as text: a string, or messages with their roles."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        if len(value) == 1:
            return str(value[0].get("content", ""))
        return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in value)
    return "" if value is None else str(value)


def clip(text: str) -> str:
    """At most TEXT_LIMIT characters; what was cut is counted."""
    text = text.strip("\n")
    if len(text) <= TEXT_LIMIT:
        return text
    return f"{text[:TEXT_LIMIT]} … ({len(text) - TEXT_LIMIT:,} more characters)"
