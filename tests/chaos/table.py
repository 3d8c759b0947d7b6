"""What the matrix found, as tables for the documentation. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tests.chaos.cells import FORMS, PHASES, ROLES, SCENES, WAYS, Cell, senseless

BEGINS, ENDS = "<!-- made by `make chaos` -->", "<!-- end of what `make chaos` made -->"
Row = Mapping[str, Any]

SIGNS = {
    "in place": "in place", "went on": "went on", "ended": "resumed", "hung": "**hung**", "": "**not hit**",
}  # fmt: skip


def sign(rows: Sequence[Row]) -> str:
    """A field of the matrix, of all seeds of a cell."""
    if not rows:
        return ""
    worst = max(rows, key=lambda row: (bad(row), row["recovery_s"] or 0.0))
    text = SIGNS.get(worst["verdict"], f"**{worst['verdict']}**")
    if worst["verdict"] == "ended" and worst["code"] is not None:
        text += f" ({worst['code']})"
    if worst["recovery_s"] is not None:
        text += f" {worst['recovery_s']:.0f} s"
    if worst["equal"] is False:
        text += " **differs**"
    if any(worst["left"].values()):
        text += " **left**"
    return text


def bad(row: Row) -> bool:
    """The cell is not as it should be."""
    form = row["cell"].partition(":")[0] in FORMS
    fine = row["verdict"] in (("in place",) if form else ("in place", "went on", "ended"))
    return not fine or row["equal"] is not True or any(row["left"].values())


def matrix(scene: str, way: str, rows: Mapping[str, Row]) -> list[str]:
    """Lines of a table: roles down, phases across."""
    by_cell: dict[tuple[str, str], list[Row]] = {}
    for row in rows.values():
        found, role, phase, how, _ = row["cell"].split(":")
        if (found, how) == (scene, way):
            by_cell.setdefault((role, phase), []).append(row)
    roles = [role for role in ROLES if any(role == one for one, _ in by_cell)]
    phases = [phase for phase in PHASES if any(phase.replace(" ", "-") == one for _, one in by_cell)]
    if not roles:
        return []
    lines = ["", f"| {way} | " + " | ".join(phases) + " |", "|---|" + "---|" * len(phases)]
    for role in roles:
        fields = [_field(scene, role, phase, way, by_cell) for phase in phases]
        lines.append(f"| {role} | " + " | ".join(fields) + " |")
    return lines


def _field(
    scene: str, role: str, phase: str, way: str, by_cell: Mapping[tuple[str, str], Sequence[Row]]
) -> str:
    rows = by_cell.get((role, phase.replace(" ", "-")), [])
    if rows:
        return sign(rows)
    return "-" if senseless(Cell(scene, role, phase, way)) else "not run"


def forms(rows: Mapping[str, Row]) -> list[str]:
    """Lines of the table of `FORMS`: scenes down, phases across, in each field the rank that was killed."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows.values():
        scene, role, phase, _, _ = row["cell"].split(":")
        if scene in FORMS:
            found.setdefault((scene, phase), {}).setdefault(role, []).append(row)
    phases = [phase for phase in PHASES if any(phase.replace(" ", "-") == one for _, one in found)]
    lines = ["", "| kill | " + " | ".join(phases) + " |", "|---|" + "---|" * len(phases)]
    for scene in [form for form in FORMS if any(form == one for one, _ in found)]:
        fields = []
        for phase in phases:
            these = found.get((scene, phase.replace(" ", "-")), {})
            asked = any(phase == one for _, one in FORMS[scene])
            told = [f"{role}: {sign(ones)}" for role, ones in these.items()]
            fields.append(", ".join(told) or ("not run" if asked else "-"))
        lines.append(f"| {scene} | " + " | ".join(fields) + " |")
    return lines if found else []


def numbers(rows: Mapping[str, Row]) -> list[str]:
    """Sums over the matrix: how it ended, how fast, and whatever is not as it should be."""
    count = Counter(SIGNS.get(row["verdict"], row["verdict"]) for row in rows.values())
    lines = ["", f"{len(rows)} cells: " + ", ".join(f"{n} {name}" for name, n in count.most_common()) + "."]
    for verdict, text in (("in place", "Recovered in place"), ("ended", "Ended and gone on")):
        these = [row for row in rows.values() if row["verdict"] == verdict and row["recovery_s"] is not None]
        if these:
            lines.append(
                f"{text}: told after {spread([row['detection_s'] or 0.0 for row in these])} s, the next step "
                f"done after {spread([row['recovery_s'] for row in these])} s, of which "
                f"{spread([row['loading_s'] or 0.0 for row in these])} s were loading; at most "
                f"{max(row['steps_lost'] for row in these)} steps done again."
            )
    missed = sum(not row["hit"] for row in rows.values())
    unnamed = sum(
        row["verdict"] == "ended" and row["code"] == 1 and not row["named"] for row in rows.values()
    )
    lines.append(
        f"Signals that came after the call they were meant for: {missed}. Runs that ended with exit 1 and "
        f"without the name of what was lost: {unnamed}."
    )
    faults = [row for row in rows.values() if bad(row)]
    lines += ["", "Not as it should be:" if faults else "Nothing is other than it should be."]
    lines += [f"- `{row['cell']}`: {row['verdict']}; {_short(row['said'])}" for row in faults]
    return lines


def _short(text: str) -> str:
    """A message in one line that can stand in a page."""
    return (
        " ".join(text.split())[-240:].replace("|", "/").replace("<", "(").replace(">", ")") or "nothing said"
    )


def spread(values: Sequence[float]) -> str:
    """Median and largest: `2.1 (at most 7.9)`."""
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:.1f} (at most {ordered[-1]:.1f})"


def page(rows: Mapping[str, Row], how: str) -> str:
    """The text between `BEGINS` and `ENDS`; `how`: where and when it was made."""
    lines = [BEGINS, how]
    for scene in SCENES:
        tables = [line for way in WAYS for line in matrix(scene, way, rows)]
        if tables:
            lines += ["", f"### {scene}", *tables]
    if table := forms(rows):
        lines += ["", "### Other forms of a policy", *table]
    return "\n".join([*lines, *numbers(rows), "", ENDS])


def put_into(text: str, made: str) -> str:
    """A page with what was made in place of what an earlier run made."""
    before, _, rest = text.partition(BEGINS)
    _, _, after = rest.partition(ENDS)
    return before + made + after
