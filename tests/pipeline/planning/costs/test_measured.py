"""What a plan says of memory and seconds against what a rank took: the table in docs/plan.md.

What was measured is recorded (`python -m benchmarks.plan --seconds`); what is predicted is worked out anew.
Each slow test measures a row again, in a process that loads a base of 35 to 124 M parameters and trains three
steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan import CASES, RESULTS, budget_of, compared, predicted, predicted_seconds

WITHIN, SECONDS_WITHIN = 0.10, 0.25
ROWS: list[dict[str, Any]] = json.loads((RESULTS / "plan.json").read_text())
MIB = 2**20


@pytest.mark.parametrize("row", ROWS, ids=[row["case"] for row in ROWS])
def test_what_ranks_took_is_what_plans_say(row: dict[str, Any], repository: Path) -> None:
    budget = budget_of(CASES[row["case"]])
    took, now = row["measured"], sum(predicted(budget).values())
    spent, planned = row["cpu_seconds"], predicted_seconds(budget, row["rates"])
    off, late = now / took - 1, planned / spent - 1
    assert abs(off) <= WITHIN
    assert abs(late) <= SECONDS_WITHIN
    memory = f"| {row['case']} | {now / MIB:,.0f} | {took / MIB:,.0f} | {100 * off:+.0f} % |"
    shown = f"{memory} {planned:.1f} | {spent:.1f} | {100 * late:+.0f} % |"
    assert shown in (repository / "docs" / "plan.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_a_rank_takes_what_its_plan_says(name: str, tmp_path: Path) -> None:
    found = compared(name, tmp_path)
    off = found["predicted"] / found["measured"] - 1
    assert abs(off) <= WITHIN, f"{off:+.0%}: {found}"
