"""Trees of engines that pass versions on, as a pure function of nodes and fan-out."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from actors.sync.relay_tree import TOP, children, levels, relay_tree


def on_nodes(*sizes: int) -> dict[int, str]:
    """Engines by node: the first so many on the first one, ..."""
    names = [f"node-{i}" for i, size in enumerate(sizes) for _ in range(size)]
    return dict(enumerate(names))


def test_few_engines_get_everything_from_the_trainer() -> None:
    assert relay_tree(on_nodes(2, 2), 4) == {0: TOP, 1: TOP, 2: TOP, 3: TOP}
    assert relay_tree({}, 4) == {}


def test_one_engine_of_each_node_passes_on_to_the_others_of_its_node() -> None:
    assert relay_tree(on_nodes(3, 3), 4) == {0: TOP, 1: 0, 2: 0, 3: TOP, 4: 3, 5: 3}


def test_more_nodes_than_the_fan_out_get_it_from_other_nodes() -> None:
    parents = relay_tree(on_nodes(*[1] * 8), 2)
    assert parents == {0: TOP, 1: TOP, 2: 0, 3: 0, 4: 1, 5: 1, 6: 2, 7: 2}


def test_more_engines_on_a_node_than_the_fan_out_get_it_in_several_steps() -> None:
    parents = relay_tree(on_nodes(8), 2)
    assert parents == {0: TOP, 1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2, 7: 3}
    assert levels(parents) == {0: 1, 1: 2, 2: 2, 3: 3, 4: 3, 5: 3, 6: 3, 7: 4}


def test_an_engine_that_passes_nothing_on_is_a_leaf_and_another_takes_its_place() -> None:
    parents = relay_tree(on_nodes(3, 3), 2, leaves={0})
    assert parents == {1: TOP, 2: 1, 0: 1, 3: TOP, 4: 3, 5: 3}
    assert relay_tree(on_nodes(8), 2, leaves={1, 2}) == {0: TOP, 3: 0, 4: 0, 5: 3, 6: 3, 7: 4, 1: 4, 2: 5}


def test_a_node_of_leaves_gets_everything_from_the_trainer() -> None:
    assert relay_tree(on_nodes(2, 2), 2, leaves={0, 1}) == {2: TOP, 3: 2, 0: TOP, 1: TOP}


def test_who_is_sent_to_is_told_by_sender() -> None:
    parents = relay_tree(on_nodes(3, 3), 4)
    assert children(parents, parents) == {TOP: [0, 3], 0: [1, 2], 1: [], 2: [], 3: [4, 5], 4: [], 5: []}


@pytest.mark.parametrize("seed", range(50))
def test_every_engine_is_reached_once_within_the_fan_out_and_few_steps(seed: int) -> None:
    draw = random.Random(seed)
    nodes = on_nodes(*(draw.randint(1, 16) for _ in range(draw.randint(1, 40))))
    fan_out = draw.randint(1, 6)
    leaves = {engine for engine in nodes if draw.random() < draw.choice((0.0, 0.1, 1.0))}
    parents = relay_tree(nodes, fan_out, leaves)
    assert parents.keys() == nodes.keys()
    reached = levels(parents)  # Ends, so there is no circle.
    if len(nodes) <= fan_out:
        return
    assert not leaves & set(parents.values())
    there = {nodes[engine] for engine in nodes.keys() - leaves}
    of_trainer = [engine for engine, parent in parents.items() if parent == TOP and nodes[engine] in there]
    assert len(of_trainer) == min(len(there), fan_out)
    if not leaves:
        abroad = Counter(p for e, p in parents.items() if p != TOP and nodes[e] != nodes[p])
        at_home = Counter(p for e, p in parents.items() if p != TOP and nodes[e] == nodes[p])
        assert max([*abroad.values(), *at_home.values()]) <= fan_out
        largest = max(Counter(nodes.values()).values())
        if fan_out > 1:
            assert max(reached.values()) <= len(there).bit_length() + largest.bit_length()
