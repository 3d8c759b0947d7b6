"""Plays whole conversations: rows and seeds in, samples out, for training and for evaluation alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.data.tokens.prompts import PromptData
from pipeline.environments.episodes import Episodes, Start
from pipeline.environments.prepared import Conversing
from pipeline.environments.processes import Environments

if TYPE_CHECKING:
    from actors.batches import Generations, SamplingSpec
    from actors.rollout.pool import RolloutPool


class Player:
    """Conversations of one environment with the policy in the engines."""

    def __init__(self, settings: Conversing, tokenizer: Any) -> None:
        spec = settings.spec
        self._settings, self._tokenizer = settings, tokenizer
        self._environments = Environments(spec.env, spec.tools, spec.env_timeout_s, spec.agent)

    def play(
        self,
        rollout: RolloutPool,
        prompts: PromptData,
        sampling: SamplingSpec,
        seeds: Sequence[int],
        env_seeds: Sequence[int],
    ) -> Generations:
        """A conversation for each seed, `sampling.n` to a prompt; may be called by several threads at once.

        Args:
            prompts: one entry a conversation.
            seeds: of the policy's turns.
            env_seeds: of the environments.

        Raises:
            RunFailure: an environment failed and nothing stands in for its answer; or as
                `RolloutPool.generate`, which also raises InvariantViolation.
        """
        columns = prompts.columns
        starts = [
            Start(
                {name: values[i] for name, values in columns.items()} | {"prompt": prompts.messages[i]},
                prompts.texts[i],
                prompts.token_ids[i],
                prompts.template_kwargs[i],
                seed,
                env_seed,
            )
            for i, (seed, env_seed) in enumerate(zip(seeds, env_seeds, strict=True))
        ]
        with self._environments.process() as process:
            episodes = Episodes(self._settings, process, self._tokenizer, sampling, starts)
            seconds = rollout.converse(episodes, sampling)
            return episodes.made(sampling.n, seconds)
