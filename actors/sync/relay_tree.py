"""Ways of a version to many engines: a tree of engines that pass on what they got. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

TOP = -1
"""The trainer, in the place of a parent."""


def relay_tree(nodes: Mapping[int, str], fan_out: int, leaves: Collection[int] = ()) -> dict[int, int]:
    """Engine -> who sends to it: `TOP`, or another engine.

    Up to `fan_out` engines get everything from the trainer. Of more, one on each node does, or gets it from
    one of another node, and passes it on within its node: nobody sends to more than `fan_out` nodes and, on
    its own, to `fan_out` engines. So the trainer sends min(nodes, `fan_out`) copies.

    Args:
        nodes: the node of each engine.
        fan_out: at least 1.
        leaves: engines that pass nothing on. Where a node has no others, the trainer sends to each of them.
    """
    if len(nodes) <= fan_out:
        return dict.fromkeys(nodes, TOP)
    members: dict[str, list[int]] = {}
    for engine in sorted(nodes, key=lambda engine: (engine in leaves, engine)):
        members.setdefault(nodes[engine], []).append(engine)
    heads = sorted(group[0] for group in members.values() if group[0] not in leaves)
    parents = _heap(TOP, heads, heads, fan_out)
    for first, *others in members.values():
        if first in leaves:
            parents |= dict.fromkeys([first, *others], TOP)
        else:
            parents |= _heap(first, others, [one for one in others if one not in leaves], fan_out)
    return parents


def levels(parents: Mapping[int, int]) -> dict[int, int]:
    """Engine -> how many times what it gets was sent: 1 below the trainer."""
    found: dict[int, int] = {TOP: 0}

    def level(engine: int) -> int:
        if engine not in found:
            found[engine] = 1 + level(parents[engine])
        return found[engine]

    return {engine: level(engine) for engine in parents}


def children(parents: Mapping[int, int], of: Iterable[int]) -> dict[int, list[int]]:
    """Engine (or `TOP`) -> those that it sends to."""
    found: dict[int, list[int]] = {one: [] for one in of}
    for engine, parent in sorted(parents.items()):
        found.setdefault(parent, []).append(engine)
    return found


def _heap(root: int, engines: Sequence[int], able: Sequence[int], fan_out: int) -> dict[int, int]:
    """Parents of `engines`, of which those that are `able` to pass on come first."""
    senders = [root, *able]
    return {engine: senders[min(i // fan_out, len(senders) - 1)] for i, engine in enumerate(engines)}
