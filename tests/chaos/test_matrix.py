"""The pure parts of the matrix: which cells there are, when they are played, how they are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from tests.chaos import bases
from tests.chaos.cells import (
    CALLS,
    FORMS,
    ON_NODES,
    PHASES,
    ROLES,
    SCENES,
    WAYS,
    Cell,
    all_cells,
    chosen,
    next_cell,
    senseless,
)
from tests.chaos.observe import Calls, Tail, is_about
from tests.chaos.scene import Outcome
from tests.chaos.soak import Story, Watch, losses
from tests.chaos.table import BEGINS, ENDS, bad, page, put_into


def test_every_cell_has_a_reason_to_be_left_out_or_a_call_that_shows_its_moment() -> None:
    cells = [cell for cell in all_cells() if cell.scene not in FORMS]
    assert len({cell.key for cell in cells}) == len(SCENES) * len(ROLES) * len(PHASES) * len(WAYS)
    for cell in cells:
        reason = senseless(cell)
        assert reason is None or len(reason) > 10
        if reason is None and cell.scene != "nodes":
            who, call = cell.leader()
            assert who in ROLES
            assert call is not None or cell.phase == "start"


def test_every_role_is_killed_and_stopped_in_every_phase_in_which_it_works() -> None:
    played = {(cell.role, cell.phase, cell.way) for cell in chosen([], 1) if cell.scene == "ppo"}
    for way in WAYS:
        for phase in ("load", "scoring", "update", "sync stage", "sync commit", "save"):
            assert ("policy-1", phase, way) in played
        for phase in ("start", "load", "generation", "sync stage", "sync commit", "evaluation"):
            assert ("rollout-0", phase, way) in played
        assert {("critic-0", "update", way), ("reference-0", "scoring", way)} <= played
        assert ("reward-0", "scoring", way) in played
        assert ("driver", "update", way) in played
    assert ("reference-0", "sync commit", "kill") not in played


def test_every_form_of_a_policy_is_a_run_whose_ranks_are_killed_in_what_they_do(tmp_path: Path) -> None:
    for name, moments in FORMS.items():
        make = bases.offline if name in bases.OFFLINE else bases.form
        bases.command_for(tmp_path, make(name, tmp_path / "run", 4, 1.0))
        run = load_config(tmp_path / "run.yaml")
        (stage,) = run.stages
        assert stage == bases.stage_of(name)
        for role, phase in moments:
            if name in ON_NODES:
                assert (role, Cell(name, role, phase, "kill").leader()[0] in ROLES) == ("node", True)
                continue
            assert phase in CALLS["policy"]
            assert int(role.removeprefix("policy-")) < run.roles.policy.workers
    assert {cell.scene for cell in chosen([], 1)} == {*SCENES, *FORMS}
    assert len(chosen(["experts:*", "kto"], 1)) == len(FORMS["experts"]) + len(FORMS["kto"])


def test_a_moment_is_a_function_of_its_cell() -> None:
    cell = Cell("ppo", "policy-0", "update", "kill")
    others = [Cell("ppo", "policy-0", "update", "kill", seed).moment() for seed in range(1, 20)]
    assert cell.moment() == Cell("ppo", "policy-0", "update", "kill").moment()
    assert len({cell.moment(), *others}) == 20
    assert all(0 <= moment < 0.9 for moment in others)


def test_cells_share_lives_of_a_run() -> None:
    start, update = Cell("ppo", "rollout-0", "start", "kill"), Cell("ppo", "policy-0", "update", "kill")
    ends, evaluation = Cell("ppo", "raylet", "save", "kill"), Cell("ppo", "gcs", "evaluation", "kill")
    cells = [evaluation, update, ends, start]
    assert next_cell(cells, under_way=False) == start
    assert next_cell(cells, under_way=True) == ends, "a life has to end before another start can be hit"
    assert next_cell([evaluation, update, start], under_way=True) == update
    assert next_cell([evaluation, update, ends], under_way=True) == update
    assert next_cell([evaluation], under_way=True) == evaluation
    assert next_cell([], under_way=True) is None


def row(cell: str, **changes: object) -> dict[str, object]:
    outcome = Outcome(cell, verdict="in place", hit=True, named=True, recovery_s=7.2, equal=True).row()
    return outcome | {"detection_s": 0.4, "loading_s": 5.0} | changes


def test_the_page_tells_each_cell_and_whatever_is_not_as_it_should_be() -> None:
    lost = {"processes": ["17 ray::Worker"]}
    rows = {
        "a": row("ppo:policy-0:update:kill:0"),
        "b": row("ppo:policy-0:update:kill:1", verdict="hung", said="a | b", equal=None, recovery_s=None),
        "c": row("ppo:driver:save:kill:0", verdict="ended", code=-9, recovery_s=21.0),
        "d": row("dpo:policy-1:save:stop:0", equal=False),
        "e": row("dpo:policy-1:load:stop:0", left=lost),
    }
    told = page(rows, "Made today.")
    assert "| policy-0 | not run | not run |" not in told, "columns are the phases that were played"
    assert "| policy-0 | **hung** | not run |" in told
    assert "| driver | not run | resumed (-9) 21 s |" in told
    assert "in place 7 s **differs**" in told
    assert "in place 7 s **left**" in told
    assert "`ppo:policy-0:update:kill:1`: hung; a / b" in told
    assert [bad(one) for one in rows.values()] == [False, True, False, True, True]
    assert "Nothing is other than it should be." in page({"a": rows["a"]}, "")
    before = f"# Chaos\n{BEGINS}\nold\n{ENDS}\nafter\n"
    assert put_into(put_into(before, told), told) == f"# Chaos\n{told}\nafter\n"


def test_a_rank_of_another_form_that_was_not_replaced_is_a_fault() -> None:
    ended = row("whole:policy-0:update:kill:0", verdict="ended", code=1, recovery_s=30.0)
    rows = {"a": row("experts+full:policy-3:update:kill:0"), "b": ended}
    told = page(rows, "")
    assert "| kill | update |" in told
    assert "| experts+full | policy-3: in place 7 s |" in told
    assert "| whole | policy-0: resumed (1) 30 s |" in told
    assert [bad(one) for one in rows.values()] == [False, True]


def test_a_file_that_grows_is_read_line_by_line_and_anew_when_it_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = Tail(file)
    assert tail.rows() == []
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [one["step"] for one in tail.rows()] == [1, 2]
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    assert [one["step"] for one in tail.rows()] == [1, 2, 3]
    file.write_text('{"step": 1}\n')
    assert [one["step"] for one in tail.rows()] == [1]


def test_a_process_is_inside_a_call_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    trace = tmp_path / "logs" / "trace"
    trace.mkdir(parents=True)
    calls, update = Calls(tmp_path, "policy-0"), ("updates.update", "update")
    begun = {"method": "updates.update", "phase": "update", "start": 5.0}
    assert calls.inside(update, after=0) is None
    (trace / "policy-0.begun").write_text(json.dumps(begun) + "\n")
    assert calls.inside(update, after=0) == begun
    assert calls.inside(update, after=6) is None
    assert calls.inside(("build", "load"), after=0) is None
    (trace / "policy-0.jsonl").write_text(json.dumps(begun | {"end": 5.5}) + "\n")
    assert calls.inside(update, after=0) is None
    assert calls.seconds(update) == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("line", "role", "tells"),
    [
        (
            "ppo step 4: rollout-1 was replaced: its process died; its samples were drawn again",
            "rollout-1",
            1,
        ),
        ("failed: policy-0 failed in phase 'update': its process died", "policy-0", 1),
        ("failed: ray failed in phase 'run': the GCS has died", "gcs", 1),
        ("failed: ray failed in phase 'run': the GCS has died", "raylet", 0),
        ("ppo 12/60 loss 0.3", "policy-0", 0),
    ],
)
def test_a_line_about_a_loss_is_known_by_its_name(line: str, role: str, tells: int) -> None:
    assert is_about(line, role) == bool(tells)


def test_what_grows_over_a_long_run_has_a_slope() -> None:
    flat, grows = [(step, 100.0) for step in range(500)], [(step, 100 + step / 50) for step in range(500)]
    told = Watch({"flat": flat, "grows": grows, "short": [(499, 1.0)]}).rows(500)
    assert told[2:] == ["| flat | 100.0 | 100.0 | +0.00 |", "| grows | 103.0 | 109.0 | +2.00 |"]


def test_a_long_run_says_whether_its_kills_explain_its_processes() -> None:
    said = losses(
        [
            "rollout-1 was lost: its process died (killed); another takes its place",
            "policy-0 was lost: no answer within 62 s (limits.update); another takes its place",
            "policy-1 was lost: no answer within 70 s (limits.update); another takes its place",
            "rollout-1 was replaced: its process died (killed) (2.0 s to replace)",
            "failed: policy ranks 0, 1 failed in phase 'update': no answer within 10 s",
            "grpo 12/60 loss 0.3",
        ]
    )
    assert said == {
        "rollout was lost: its process died (killed)": 1,
        "policy was lost: no answer within N s (limits.update)": 2,
        "policy failed in phase 'update': no answer within N s": 1,
    }
    story = Story(killed=["policy-0", "rollout-0", "policy-1"], starts=1, losses=said)
    told = story.rows({"policy-0": 3, "policy-1": 3, "rollout-0": 2, "rollout-1": 1})
    assert "| policy-0 | 1 | 2 | 3 |" in told
    assert "Lives explained by kills: yes. Said of lost processes:" in told
    assert "- 2 x policy was lost: no answer within N s (limits.update)" in told
    assert "explained by kills: **no**" in "".join(story.rows({"rollout-1": 2}))
    assert "explained by kills: **no**" in "".join(Story(starts=2).rows({"policy-0": 1}))
