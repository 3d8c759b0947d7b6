"""Samples of several turns: what the engine drew counts, what an environment said does not."""

from __future__ import annotations

import numpy as np

from actors.batches import Generations, trajectory_batch
from actors.batches.episodes import Episode, GrowingSample


def grown() -> Generations:
    """Two samples: [5 6] drawn, [7] said, [8] drawn; and [9] drawn alone."""
    samples = []
    for turns in ([([5, 6], [-0.5, -1.0], 3), ([8], [-0.25], 4)], [([9], [-2.0], 3)]):
        sample = GrowingSample([1, 2])
        for number, (ids, logprobs, version) in enumerate(turns):
            if number:
                sample.said([7])
            sample.drew(ids, logprobs, [version] * len(ids), 0)
            sample.earned(0.5 + number)
        samples.append(sample)
    episodes = [
        Episode([1, 2], "?", [{"role": "user", "content": "?"}], [], one.turns, "done") for one in samples
    ]
    return Generations.of_episodes(samples, episodes, 2, "m", 1.0)


def test_the_engines_tokens_alone_are_counted_with_their_logprobs_and_rewards() -> None:
    samples = grown()
    batch = trajectory_batch([[1, 2], [1, 2]], samples)
    assert batch.token_ids.tolist() == [1, 2, 5, 6, 7, 8, 1, 2, 9]
    assert batch.loss_mask.tolist() == [False, False, True, True, False, True, False, False, True]
    assert batch.token_columns["engine_logps"].tolist() == [-0.5, -1.0, -0.25, -2.0]
    assert batch.token_columns["turn_rewards"].tolist() == [0.0, 0.5, 1.5, 0.5]
    assert samples.drawn_versions.tolist() == [3, 3, 4, 3]
    assert samples.drawn_lengths.tolist() == [3, 1]


def test_selecting_joining_and_saving_keep_all_of_a_conversation() -> None:
    samples = grown()
    assert samples.episodes is not None
    turned = samples.select([1, 0])
    assert turned.episodes == samples.episodes[::-1]
    assert turned.drawn_lengths.tolist() == [1, 3]
    joined = Generations.join([samples, turned], 2, mixed=True)
    assert joined.drawn_lengths.tolist() == [3, 1, 1, 3]
    again = Generations.from_arrays(
        joined.arrays(), 2, "m", 1.0, [vars(one) for one in joined.episodes or ()]
    )
    assert again.episodes == joined.episodes
    assert all(
        np.array_equal(again.arrays()[k], v, equal_nan=k == "turn_rewards")
        for k, v in joined.arrays().items()
    )


def test_experts_of_a_position_are_those_of_the_turn_that_computed_it_first() -> None:
    def routes(positions: int, turn: int) -> np.ndarray:
        return np.full((positions, 1, 1), turn, np.uint8)

    sample = GrowingSample([1, 2])
    sample.drew([5, 6], [0.0, 0.0], [0, 0], 0, routes(3, turn=1))  # Its last token is computed by nobody yet.
    sample.said([7, 7])
    sample.drew([8, 8], [0.0, 0.0], [0, 0], 0, routes(7, turn=2))
    made = Generations.of_episodes([sample], [Episode([1, 2], "?", [], [], 2, "done")], 1, "m", 1.0)
    assert made.routed_experts is not None
    assert made.routed_experts.experts.ravel().tolist() == [1, 1, 1, 2, 2, 2, 2]
    batch = trajectory_batch([[1, 2]], made)
    assert batch.experts is not None
    assert len(batch.experts) == 8
