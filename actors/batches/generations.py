"""Requests to a rollout engine and its answers: sampling settings, seeds, generations."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from actors.batches.episodes import Episode, GrowingSample
from actors.batches.routed_experts import RoutedExperts
from actors.spec import Spec

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
"""Values that `Generations.finish` indexes, by vLLM's names. stop: an end-of-turn token or a stop string;
length: the token limit."""
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.01, 2.0
"""Bounds of vLLM's `SamplingParams`: it draws at 0.01 whatever is asked for below, with no more than a
warning in the engine's log, and refuses what is above 2."""


def possible_temperature(value: float, *, greedy: bool) -> float:
    """The temperature itself, where vLLM samples at just this one.

    Args:
        value: temperature that was asked for.
        greedy: 0 is allowed too: the most probable token.

    Raises:
        ValueError: it doesn't, with what to write.
    """
    if LEAST_TEMPERATURE <= value <= LARGEST_TEMPERATURE or (greedy and value == 0):
        return value
    zero = ", or 0 for the most probable token" if greedy else ""
    reason = (
        f"vLLM takes {LARGEST_TEMPERATURE:g} at most"
        if value > LARGEST_TEMPERATURE
        else f"vLLM would draw at {LEAST_TEMPERATURE:g}"
    )
    raise ValueError(f"{value:g}: {reason}; write {LEAST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g}{zero}")


class SamplingSpec(Spec):
    """Settings of sampling, under vLLM's field names."""

    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Divides the logits; 0 is greedy."""
    max_tokens: int = Field(default=256, ge=1)
    """New tokens per sample, at most."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus: the smallest set of tokens with this much probability. 1 keeps all."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k most probable tokens. 0 keeps all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drop tokens below this share of the most probable one."""
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Divides the logits of tokens already seen; 1 is none."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Strings that end a sample, in addition to the end-of-turn token of the template and the base's EOS. A
    special token may be among them."""
    stop_token_ids: list[int] = Field(default_factory=list)
    """Token ids that end a sample, in addition to those."""
    n: int = Field(default=1, ge=1)
    """Samples per prompt, each with a seed of its own."""
    seed: int = Field(default=0, ge=0)
    """Seed from which the samples' own seeds follow when the caller gives none."""

    @field_validator("temperature")
    @classmethod
    def _possible(cls, value: float) -> float:
        return possible_temperature(value, greedy=True)


def sample_seed(run_seed: int, step: int, prompt: int, sample: int, stage: str = "", attempt: int = 0) -> int:
    """63-bit seed of one sample: a hash, because `seed + i` makes neighbouring samples collide.

    With `stage`, two stages of one run have different samples; with `attempt`, so has a group of samples that
    is generated again.
    """
    place = f"{run_seed}/{step}/{prompt}/{sample}" + (f"/{stage}/{attempt}" if stage or attempt else "")
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Generations:
    """Samples as columns: `n` of each prompt, prompt by prompt, in the order in which prompts were given."""

    token_ids: np.ndarray
    """int32 (tokens,): new tokens of all samples, the end-of-turn token included where one was sampled."""
    logprobs: np.ndarray
    """float32 (tokens,): behaviour log-probabilities, after temperature and filters (`processed`)."""
    offsets: np.ndarray
    """int64 (samples + 1,): sample `s` is `token_ids[offsets[s]:offsets[s + 1]]`."""
    finish: np.ndarray
    """int8 (samples,): index into `FINISH_REASONS`."""
    n: int
    """Samples per prompt."""
    label: str
    """Name of the weights that produced them."""
    seconds: float
    """Time in the engine."""
    token_versions: np.ndarray
    """int32 (tokens,): version of the weights that each token was sampled by, where a trainer updates the
    engine; 0 where none does. A sample can have several: weights may change while it is generated."""
    experts: np.ndarray | None = None
    """Of `RoutedExperts`, as is `expert_offsets`; None where the engine was not asked for them."""
    expert_offsets: np.ndarray | None = None
    drawn: np.ndarray | None = None
    """bool (tokens,): True where the engine drew the token, False where an environment said it; None: the
    engine drew all. What the environment said has log-probability 0 and the version of the turn before it."""
    turn_rewards: np.ndarray | None = None
    """float64 (tokens,): an environment's reward at the last token of the turn that earned it, NaN elsewhere;
    None where there is no environment."""
    episodes: tuple[Episode, ...] | None = None
    """Conversation of each sample with its environment; None where there is none."""

    @staticmethod
    def of(
        samples: Sequence[tuple[Sequence[int], Sequence[float], str]],
        n: int,
        label: str,
        seconds: float,
        version: int = 0,
    ) -> Generations:
        """Join (token ids, log-probabilities, finish reason) of each sample, all of one version."""
        lengths = [len(ids) for ids, _, _ in samples]
        return Generations(
            token_ids=np.fromiter((t for ids, _, _ in samples for t in ids), np.int32, sum(lengths)),
            logprobs=np.fromiter((v for _, values, _ in samples for v in values), np.float32, sum(lengths)),
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            finish=np.array([FINISH_REASONS.index(reason) for _, _, reason in samples], dtype=np.int8),
            n=n,
            label=label,
            seconds=seconds,
            token_versions=np.full(sum(lengths), version, np.int32),
        )

    @staticmethod
    def of_episodes(
        samples: Sequence[GrowingSample], episodes: Sequence[Episode], n: int, label: str, seconds: float
    ) -> Generations:
        """Join samples that conversed with an environment."""

        def joined(name: str, dtype: type) -> np.ndarray:
            return np.array([value for one in samples for value in getattr(one, name)], dtype)

        made = Generations(
            token_ids=joined("token_ids", np.int32),
            logprobs=joined("logprobs", np.float32),
            offsets=np.cumsum([0, *(len(one.token_ids) for one in samples)], dtype=np.int64),
            finish=np.array([one.finish for one in samples], np.int8),
            n=n,
            label=label,
            seconds=seconds,
            token_versions=joined("versions", np.int32),
            drawn=joined("drawn", np.bool_),
            turn_rewards=joined("rewards", np.float64),
            episodes=tuple(episodes),
        )
        if not samples or not samples[0].experts:
            return made
        return made.with_experts(RoutedExperts.of([np.concatenate(one.experts) for one in samples]))

    @staticmethod
    def join(parts: Sequence[Generations], n: int, *, mixed: bool = False) -> Generations:
        """Parts of one call in sample order, as if one engine had made them; `seconds` is their sum.

        `mixed`: versions may differ.

        Raises:
            ValueError: no parts, parts of different weights, or some with experts and some without.
        """
        labels = {part.label for part in parts}
        weights = {(part.label, int(v)) for part in parts for v in np.unique(part.token_versions)}
        if len(labels) != 1 or (len(weights) > 1 and not mixed):
            raise ValueError(f"generations of one model were expected, not of {sorted(weights)}")
        (label,) = labels
        choices = [part.routed_experts for part in parts]
        known = [one for one in choices if one is not None]
        if known and len(known) < len(parts):
            raise ValueError("some of these generations come with experts, others without")
        ends = np.cumsum([0, *(len(part.token_ids) for part in parts)])
        shifted = [part.offsets[1:] + start for part, start in zip(parts, ends)]
        joined = Generations(
            token_ids=np.concatenate([part.token_ids for part in parts]),
            logprobs=np.concatenate([part.logprobs for part in parts]),
            offsets=np.concatenate([np.zeros(1, np.int64), *shifted]),
            finish=np.concatenate([part.finish for part in parts]),
            n=n,
            label=label,
            seconds=sum(part.seconds for part in parts),
            token_versions=np.concatenate([part.token_versions for part in parts]),
            drawn=_joined([part.drawn for part in parts]),
            turn_rewards=_joined([part.turn_rewards for part in parts]),
            episodes=_all_episodes(parts),
        )
        return joined.with_experts(RoutedExperts.join(known)) if known else joined

    @staticmethod
    def from_arrays(
        arrays: Mapping[str, np.ndarray], n: int, label: str, seconds: float, episodes: Any = None
    ) -> Generations:
        """Generations from what `arrays` returned for them; `episodes`: their own, as JSON has them."""
        made = None if episodes is None else tuple(Episode(**one) for one in episodes)
        return Generations(**arrays, n=n, label=label, seconds=seconds, episodes=made)

    def select(self, samples: Sequence[int] | np.ndarray) -> Generations:
        """The given samples, in the given order."""
        order = np.asarray(samples, dtype=np.int64)
        lengths = np.diff(self.offsets)[order]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.arange(offsets[-1]) + np.repeat(self.offsets[order] - offsets[:-1], lengths)
        found = replace(
            self,
            token_ids=self.token_ids[tokens],
            logprobs=self.logprobs[tokens],
            offsets=offsets,
            finish=self.finish[order],
            token_versions=self.token_versions[tokens],
            experts=None,
            expert_offsets=None,
            drawn=None if self.drawn is None else self.drawn[tokens],
            turn_rewards=None if self.turn_rewards is None else self.turn_rewards[tokens],
            episodes=None if self.episodes is None else tuple(self.episodes[i] for i in order),
        )
        choices = self.routed_experts
        if choices is None:
            return found
        each = choices.samples()
        return found.with_experts(RoutedExperts.of([each[i] for i in order]))

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array, by field: with `n`, `label`, `seconds` and `episodes` this is all there is."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    @property
    def routed_experts(self) -> RoutedExperts | None:
        """The engine's experts of every position that it computed."""
        if self.experts is None or self.expert_offsets is None:
            return None
        return RoutedExperts(self.experts, self.expert_offsets)

    def with_experts(self, choices: RoutedExperts) -> Generations:
        """The same samples with the engine's experts."""
        return replace(self, experts=choices.experts, expert_offsets=choices.offsets)

    @property
    def drawn_mask(self) -> np.ndarray:
        """bool (tokens,): tokens that the engine drew."""
        return np.ones(len(self.token_ids), bool) if self.drawn is None else self.drawn

    @property
    def drawn_versions(self) -> np.ndarray:
        """int32 (drawn tokens,): versions that the engine drew them by."""
        return self.token_versions if self.drawn is None else self.token_versions[self.drawn]

    @property
    def drawn_lengths(self) -> np.ndarray:
        """int64 (samples,): tokens of each that the engine drew."""
        if self.drawn is None:
            return np.diff(self.offsets)
        ends = np.concatenate([[0], np.cumsum(self.drawn, dtype=np.int64)])
        return np.diff(ends[self.offsets])

    @property
    def earned(self) -> np.ndarray | None:
        """float64 (samples,): sums of what environments gave their turns, NaN for none; None: no environment
        gave anything."""
        turns = self.turn_rewards
        if turns is None or np.isnan(turns).all():
            return None
        parts = [turns[a:b][~np.isnan(turns[a:b])] for a, b in itertools.pairwise(self.offsets)]
        return np.array([part.sum() if len(part) else np.nan for part in parts], np.float64)

    @property
    def version(self) -> int:
        """The oldest version that one of the tokens was sampled by; 0 for no tokens."""
        return int(self.token_versions.min()) if len(self.token_versions) else 0

    @property
    def finish_reasons(self) -> list[str]:
        return [FINISH_REASONS[i] for i in self.finish]

    def sequences(self) -> Iterator[np.ndarray]:
        """Token ids, sample by sample."""
        for start, end in zip(self.offsets, self.offsets[1:], strict=False):
            yield self.token_ids[start:end]

    def texts(
        self, tokenizer: object, stop: Sequence[str] = (), stop_token_ids: Sequence[int] = ()
    ) -> list[str]:
        """Decoded without special tokens and without a stop token at the end, cut before the first stop
        string; of a conversation all that stands behind its prompt, as it is."""
        ends = set(stop_token_ids)
        samples = [ids.tolist() for ids in self.sequences()]
        if self.episodes is not None:
            return list(tokenizer.batch_decode(samples))  # type: ignore[attr-defined]
        texts = tokenizer.batch_decode(  # type: ignore[attr-defined]
            [ids[:-1] if ids and ids[-1] in ends else ids for ids in samples], skip_special_tokens=True
        )
        return [_cut(text, stop) for text in texts]


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known else None


def _all_episodes(parts: Sequence[Generations]) -> tuple[Episode, ...] | None:
    found = [part.episodes for part in parts if part.episodes is not None]
    return tuple(one for part in found for one in part) if found else None


def _cut(text: str, stop: Sequence[str]) -> str:
    found = [at for at in (text.find(string) for string in stop) if at >= 0]
    return text[: min(found)] if found else text
