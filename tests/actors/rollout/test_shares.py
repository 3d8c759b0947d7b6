"""Who draws which samples of a call: dealt evenly, moved where that ends sooner, each in one place."""

from __future__ import annotations

import random

import numpy as np
import pytest

from actors.batches.slices import Work
from actors.rollout.lengths import Lengths
from actors.rollout.pace import Pace
from actors.rollout.shares import Shares
from tests.actors.rollout.simulated import (
    Simulated,
    SimulatedPool,
    drawn_lengths,
    even_seconds,
    guided_seconds,
)

FLAT = Pace().after(Work(10, 10, 1.0)).after(Work(10, 1000, 1.01))
"""A step of a hundred samples takes 1 % longer than one of a single sample."""
STEEP = Pace().after(Work(10, 10, 0.1)).after(Work(10, 1000, 10.0))
"""A step takes as many times as long as there are samples in it."""


def shares(samples: int, engines: int, lengths: Lengths | None = None) -> Shares:
    """One sample each of so many prompts, of 100 tokens at most."""
    return Shares(range(samples), 100, lengths or Lengths(), engines)


def learnt(*tokens: int) -> Lengths:
    """What samples of prompts 0, 1, ... with so many tokens teach."""
    lengths = Lengths()
    for prompt, length in enumerate(tokens):
        lengths.saw(prompt, length)
    return lengths


# --- Expected lengths ---------------------------------------------------------------------------------


def test_a_sample_is_expected_to_reach_its_limit_until_others_were_seen() -> None:
    assert Lengths().of([1, 2], 50).tolist() == [50, 50]
    lengths = learnt(10, 30)
    lengths.saw(1, 50)
    assert lengths.of([0, 1, 7], 100).tolist() == [10, 40, 30]
    assert lengths.of([0, 1, 7], 25).tolist() == [10, 25, 25]


def test_of_a_sample_that_is_longer_than_most_more_is_expected() -> None:
    lengths = learnt(10, 20, 60)
    expected = lengths.of([9, 9, 9, 9], 100)
    given = lengths.given(expected, np.array([0.0, 12.0, 20.0, 60.0]), 100)
    assert given.tolist() == [30, 40, 60, 100]


# --- Paces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "sample"), [(9e-3, 4e-5), (1e-3, 1e-3), (0.0, 2e-3), (5e-3, 0.0)])
def test_a_pace_tells_a_steps_own_time_from_its_samples(step: float, sample: float) -> None:
    pace = Pace()
    for batch in (64, 60, 50, 31, 12, 5):
        pace = pace.after(Work(10, 10 * batch, 10 * (step + sample * batch)))
    assert pace.line() == pytest.approx((step, sample), rel=1e-6, abs=1e-9)


def test_batches_of_one_size_say_nothing_about_samples() -> None:
    """Then a sample that was begun is never drawn again elsewhere."""
    assert Pace().after(Work(10, 640, 1.0)).after(Work(5, 320, 0.5)).line() == (pytest.approx(0.1), 0.0)
    assert not Pace().after(Work(0, 0, 0.0)).known


def test_a_pace_follows_an_engine_that_becomes_slower() -> None:
    pace = Pace()
    for seconds in (1.0, 4.0):
        for batch in [8, 1] * 100:
            pace = pace.after(Work(10, 10 * batch, seconds * batch))
    assert pace.line()[1] == pytest.approx(0.4, rel=0.05)


# --- Dealing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "engines"), [(1, 3), (96, 2), (100, 3), (4096, 8), (0, 2)])
def test_all_samples_are_dealt_at_once_as_many_to_each(samples: int, engines: int) -> None:
    dealt = shares(samples, engines).deal(range(engines))
    assert sorted(number for part in dealt.values() for number in part) == list(range(samples))
    sizes = [len(dealt.get(rank, [])) for rank in range(engines)]
    assert max(sizes) - min(sizes) <= 1


def test_engines_get_as_many_expected_tokens_each_and_begin_with_the_longest() -> None:
    dealt = shares(8, 2, learnt(5, 15, 40, 20, 20, 20, 20, 20)).deal([0, 1])
    assert dealt == {0: [2, 3, 1, 0], 1: [4, 5, 6, 7]}


def test_samples_of_a_prompt_stay_together() -> None:
    one = Shares([number // 8 for number in range(64)], 100, Lengths(), 4)
    assert [len({number // 8 for number in part}) for part in one.deal(range(4)).values()] == [2] * 4


def test_a_single_engine_keeps_the_order() -> None:
    assert shares(3, 1, learnt(5, 15, 40)).deal([0]) == {0: [0, 1, 2]}


def test_samples_of_a_lost_engine_go_to_all_as_these_become_free() -> None:
    one = shares(90, 3)
    lost = one.deal([0, 1, 2])[0]
    one.lost(0)
    first = one.deal([1], [2])[1]
    second = one.deal([2], [1])[2]
    assert sorted(first + second) == sorted(lost)
    assert len(first) == len(second) == 15


def test_what_is_kept_for_an_engine_that_serves_no_more_goes_to_another() -> None:
    one = shares(8, 2)
    one.deal([0])
    moved = one.ask_back(0, [0, 1], [Pace(), Pace()], begun=True)
    one.returned(0, moved)
    assert one.deal([], [1]) == {}
    assert one.deal([0], []) == {0: moved}


# --- Giving back --------------------------------------------------------------------------------------


def begun(one: Shares, rank: int, tokens: int) -> None:
    one.saw(rank, {}, dict.fromkeys(one.shares[rank].held, tokens))


def test_half_of_what_was_not_begun_goes_to_an_engine_that_has_nothing() -> None:
    one = shares(40, 2)
    one.deal([0])
    assert len(one.ask_back(0, [0, 1], [Pace(), Pace()], begun=False)) == 20


def test_what_waits_goes_to_an_engine_with_room_and_no_more_than_makes_both_even() -> None:
    one = shares(40, 2)
    dealt = one.deal([0, 1])
    one.saw(1, dict.fromkeys(dealt[1][10:], 5), dict.fromkeys(dealt[1][:10], 1))
    one.saw(0, {}, dict.fromkeys(dealt[0], 0) | dict.fromkeys(dealt[0][:4], 1))
    moved = one.ask_back(0, [0, 1], [FLAT, FLAT], begun=False)
    assert 0 < len(moved) <= 6
    assert not {*moved} & {*dealt[0][:4]}


@pytest.mark.parametrize(
    ("pace", "tokens", "moves"),
    [(STEEP, 5, True), (STEEP, 95, False), (FLAT, 5, False), (FLAT, 95, False), (Pace(), 5, False)],
)
def test_what_was_begun_moves_where_steps_of_fewer_are_shorter_and_little_is_lost(
    pace: Pace, tokens: int, moves: bool
) -> None:
    one = shares(40, 2)
    one.deal([0])
    begun(one, 0, tokens)
    moved = one.ask_back(0, [0, 1], [pace, pace], begun=True)
    assert (15 < len(moved) < 20) if moves else not moved
    assert one.ask_back(0, [0, 1], [pace, pace], begun=False) == []


def test_an_engine_is_asked_once_at_a_time_and_for_one_other() -> None:
    one, paces = shares(80, 4), [Pace()] * 4
    one.deal([0, 1])
    first = one.ask_back(0, [0, 1, 2, 3], paces, begun=False)
    assert len(first) == 20
    assert one.ask_back(0, [0, 1, 2, 3], paces, begun=False) == []
    assert one.ask_back(1, [0, 1, 2], paces, begun=False) == []
    one.returned(0, first[:-1])
    assert sorted(one.deal([2])[2]) == sorted(first[:-1])
    # One had ended, of which it is told with the rest.
    one.saw(0, {first[-1]: 9}, {})
    assert one.held(0)


def test_only_the_engine_that_ends_last_gives() -> None:
    one = shares(30, 3)
    dealt = one.deal([0, 1])
    one.saw(0, dict.fromkeys(dealt[0][:5], 3), {})
    assert one.ask_back(0, [0, 1, 2], [Pace()] * 3, begun=False) == []
    assert one.ask_back(1, [0, 1, 2], [Pace()] * 3, begun=False)


def test_a_gift_whose_receiver_is_lost_meanwhile_is_anyones() -> None:
    one = shares(20, 2)
    one.deal([0])
    moved = one.ask_back(0, [0, 1], [Pace()] * 2, begun=False)
    one.lost(1)
    one.returned(0, moved)
    assert sorted(one.queue) == sorted(moved)


@pytest.mark.parametrize("seed", range(50))
def test_every_sample_is_in_one_place_whatever_happens(seed: int) -> None:
    generator = random.Random(seed)
    engines, samples = generator.randint(1, 5), generator.randint(1, 200)
    one, ended = shares(samples, engines), set[int]()
    asked: dict[int, list[int]] = {}
    paces = [generator.choice((STEEP, FLAT, Pace())) for _ in range(engines)]
    for _ in range(20_000):
        if not one:
            break
        rank = generator.randrange(engines)
        held = one.shares[rank].held
        if generator.random() < 0.02:
            one.lost(rank)
            asked.pop(rank, None)
        elif rank in asked:
            one.returned(rank, [number for number in asked.pop(rank) if number in held])
        elif one.deal([rank], [other for other in range(engines) if other != rank and one.held(other)]):
            pass
        elif back := one.ask_back(rank, range(engines), paces, begun=generator.random() < 0.5):
            assert {*back} <= held.keys()
            asked[rank] = back
        else:
            done = [number for number in held if generator.random() < 0.1]
            assert not ended & {*done}
            ended |= {*done}
            one.saw(
                rank, dict.fromkeys(done, 7), {n: generator.randrange(99) for n in [*held] if n not in done}
            )
        places = [*one.queue, *(n for share in one.shares for n in (*share.held, *share.kept)), *ended]
        assert sorted(places) == list(range(samples))
    assert len(ended) == samples


# --- How long it takes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "sample", "engines", "samples", "limit", "median", "within", "before"),
    [
        pytest.param(9e-3, 4e-5, 4, 256, 1536, 350, 1.05, 2.5, id="gpu"),
        pytest.param(9e-3, 4e-5, 8, 1024, 1536, 350, 1.05, 3.5, id="gpu-many"),
        pytest.param(1e-3, 1e-3, 4, 256, 1536, 350, 1.12, 1.15, id="cpu"),
        pytest.param(4e-3, 1e-3, 2, 64, 256, 50, 1.12, 1.2, id="cpu-few"),
    ],
)
def test_a_call_takes_little_longer_than_it_has_to(
    step: float,
    sample: float,
    engines: int,
    samples: int,
    limit: int,
    median: int,
    within: float,
    before: float,
) -> None:
    """In multiples of all at once and even: `within`, and above `before` where parts follow each other."""
    group = [Simulated(step, sample) for _ in range(engines)]
    pool, ratios, guided = SimulatedPool(group), [], []
    for seed in range(8):
        lengths = drawn_lengths(samples, limit, median, seed)
        even = even_seconds(lengths, group)
        ratios.append(pool.call(lengths, limit) / even)
        guided.append(guided_seconds(lengths, group) / even)
    assert np.median(ratios) < within
    assert np.median(guided) > before
    assert np.median(ratios) < np.median(guided)
    assert pool.again < 0.05 * 8 * samples * median


@pytest.mark.parametrize(("slower", "within"), [(2.0, 1.35), (10.0, 1.35)])
def test_an_engine_that_is_slower_than_the_others_keeps_what_it_gets_to(slower: float, within: float) -> None:
    group = [Simulated(4e-3 * slower, 1e-3 * slower), Simulated(4e-3, 1e-3)]
    pool, ratios = SimulatedPool(group), []
    for seed in range(8):
        lengths = drawn_lengths(256, 256, 50, seed)
        ratios.append(pool.call(lengths, 256) / even_seconds(lengths, group))
    assert np.median(ratios) < within
    assert pool.moved > 0


def test_where_steps_take_as_long_for_few_as_for_many_nothing_begun_is_drawn_again() -> None:
    pool = SimulatedPool([Simulated(9e-3, 4e-5), Simulated(13.5e-3, 6e-5)])
    for seed in range(4):
        pool.call(drawn_lengths(256, 1536, 350, seed), 1536)
    assert pool.again == 0


def test_engines_with_room_for_fewer_samples_than_they_are_dealt_end_together() -> None:
    """Prompts 0 to 127 are known to have short answers, the others long ones; then it turns out otherwise, by
    which one of the engines has 18 times the work of the other."""
    pool = SimulatedPool([Simulated(9e-3, 4e-5, room=16), Simulated(9e-3, 4e-5, room=16)])
    lengths = np.where(np.arange(256) < 128, 40, 400)
    pool.call(lengths, 1000)
    surprise = lengths[::-1].copy()
    seconds = pool.call(surprise, 1000)
    assert pool.moved > 20
    assert pool.again == 0
    assert seconds < 1.3 * even_seconds(surprise, pool.engines)
