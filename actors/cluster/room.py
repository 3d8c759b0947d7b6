"""Room on nodes for the processes of roles; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.cluster.spec import RoleSpec, bundle


def by_size(roles: Mapping[str, RoleSpec]) -> list[str]:
    """Roles in the order in which room is taken for them: what asks for most on one node comes first.

    Ray takes the node with most room for each role by itself: two roles of one GPU would leave three free on
    each of two nodes of four, and of three engines with two GPUs one would wait for ever.
    """
    own = {name: role for name, role in roles.items() if role.share is None}
    return sorted(own, key=lambda name: _size(_unit(own[name])), reverse=True)


def shortages(
    roles: Mapping[str, RoleSpec], nodes: Sequence[Mapping[str, float]], where: str = "the cluster"
) -> list[str]:
    """Resources that `nodes` lack to hold `roles`, one line each: sums over the cluster, then per process.
    `where`: what has the nodes, in words."""
    own = {name: role for name, role in roles.items() if role.share is None}
    problems = []
    for resource in sorted({resource for role in own.values() for resource in bundle(role)}):
        parts = {name: role.workers * bundle(role).get(resource, 0.0) for name, role in own.items()}
        needed, there = sum(parts.values()), sum(node.get(resource, 0.0) for node in nodes)
        if needed > there + 1e-6:
            key = {"CPU": "cpus", "GPU": "gpus"}.get(resource, f"resources.{resource}")
            terms = " + ".join(
                f"roles.{name}.workers {own[name].workers} x {key} {bundle(own[name])[resource]:g}"
                for name, part in parts.items()
                if part
            )
            right = f"lower workers or {key} to {there:g} together" if there else f"leave {key} out"
            problems.append(
                f"roles: {needed:g} {resource} asked for ({terms}), {where} has {_or_none(there)}; {right}, "
                "or name a cluster that has them (ray.address)"
            )
    problems += [
        f"roles.{name}.placement: strict_spread puts {role.workers} workers on as many nodes, {where} has "
        f"{len(nodes)}; lower workers, or take spread or pack"
        for name, role in own.items()
        if role.placement == "strict_spread" and role.workers > len(nodes)
    ]
    return problems or _alone(own, nodes) or _side_by_side(own, nodes)


def _alone(roles: Mapping[str, RoleSpec], nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """What must be on one node and is more than any node has."""
    problems = []
    for name, role in roles.items():
        if not any(_fits(bundle(role), node) for node in nodes):
            asked = listed(bundle(role))
            problems.append(f"roles.{name}: no single node has {asked}, which each of its processes needs")
        elif not any(_fits(_unit(role), node) for node in nodes):
            problems.append(
                f"roles.{name}.placement: strict_pack puts {role.workers} workers on one node, and no single "
                f"node has {listed(_unit(role))}; lower workers, or take pack or spread"
            )
    return problems


def _side_by_side(roles: Mapping[str, RoleSpec], nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """Processes that find no node with room, though there is enough in all: what is left lies on several
    nodes. Those that ask for most GPUs come first, each on the fullest node that holds it."""
    left, problems = [dict(node) for node in nodes], []
    for name in by_size(roles):
        role = roles[name]
        unit, apart = _unit(role), role.placement == "strict_spread"
        units, used = 1 if role.placement == "strict_pack" else role.workers, set[int]()
        for placed in range(units):
            room = [i for i, node in enumerate(left) if _fits(unit, node) and not (apart and i in used)]
            if not room:
                problems.append(
                    f"roles.{name}: {units - placed} of {units} x ({listed(unit)}) find no node with room: "
                    f"they lack {listed({r: v * (units - placed) for r, v in unit.items()})} in one piece "
                    f"each, beside the other processes; lower workers, or ask for less"
                )
                break
            best = min(room, key=lambda i: _size(left[i]))
            used.add(best)
            left[best] = {r: amount - unit.get(r, 0.0) for r, amount in left[best].items()}
    return problems


def _unit(role: RoleSpec) -> dict[str, float]:
    """What has to be on one node: a process, or all of a role that is packed strictly."""
    times = role.workers if role.placement == "strict_pack" else 1
    return {resource: times * amount for resource, amount in bundle(role).items()}


def _fits(asked: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(resource, 0.0) + 1e-6 >= amount for resource, amount in asked.items())


def _size(amounts: Mapping[str, float]) -> tuple[float, float]:
    return amounts.get("GPU", 0.0), amounts.get("CPU", 0.0)


def listed(amounts: Mapping[str, float]) -> str:
    """Amounts of resources in words."""
    return ", ".join(f"{amount:g} {resource}" for resource, amount in amounts.items())


def _or_none(amount: float) -> str:
    return f"{amount:g}" if amount else "none"
