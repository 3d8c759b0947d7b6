"""Names of variables that go along: checked everywhere, their values told nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.cluster import passed_on
from actors.cluster.spec import LimitsSpec, RaySpec, RoleSpec
from actors.errors import UserError
from actors.trainer.remote import host_group
from pipeline.cli.app import main
from pipeline.config.load import load_config
from pipeline.jobs.handover import VARIABLE, told_secrets

SECRET = "hf_abcdefghijklmnop"
RUN = (
    "name: a\nmodel: {base: 'builtin:tiny-moe'}\nstages: {sft: {data: 'builtin:arithmetic', max_steps: 2}}\n"
)


@pytest.mark.parametrize(
    "given",
    [
        f"[HF_TOKEN={SECRET}]",
        f"{{HF_TOKEN: {SECRET}}}",
        f"[{{HF_TOKEN: {SECRET}}}]",
        SECRET,
        "[RAY_ADDRESS]",
        "[1]",
    ],
)
def test_all_but_names_is_refused_without_a_word_of_what_was_given(tmp_path: Path, given: str) -> None:
    (tmp_path / "run.yaml").write_text(f"{RUN}ray: {{env: {given}}}\n")
    with pytest.raises(UserError, match=r"ray\.env: .*must be a list of names") as caught:
        load_config(tmp_path / "run.yaml")
    assert SECRET not in str(caught.value)
    assert len(caught.value.problems) == 1


def test_names_are_kept_once() -> None:
    assert RaySpec(env=["HF_TOKEN", "WANDB_API_KEY", "HF_TOKEN"]).env == ["HF_TOKEN", "WANDB_API_KEY"]


def test_a_name_that_is_not_set_is_refused_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SET_HERE", "")
    (tmp_path / "run.yaml").write_text(f"{RUN}ray: {{env: [SET_HERE, NOT_HERE, NOR_HERE]}}\n")
    for command in (
        ["validate", "run.yaml"],
        ["run", "run.yaml"],
        ["submit", "run.yaml", "output_dir=/mnt/a"],
    ):
        assert main(command) == 2
        assert "NOT_HERE, NOR_HERE are not set here" in capsys.readouterr().err.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert passed_on(["SET_HERE"]) == {"SET_HERE": ""}


def test_an_override_that_holds_a_secret_is_refused_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("PLAIN", "plain-value-of-some-length")
    monkeypatch.setenv("SHORT_TOKEN", "1")
    overrides = [
        f"stages.sft.data=https://me:{SECRET}@host/rows.jsonl",
        "seed=1",
        "name=plain-value-of-some-length",
    ]
    (problem,) = told_secrets(overrides, [])
    assert problem.startswith("stages.sft.data: holds the value of the variable WANDB_API_KEY")
    assert SECRET not in problem
    assert [line.partition(":")[0] for line in told_secrets(overrides, ["PLAIN"])] == [
        "stages.sft.data",
        "name",
    ]


@pytest.mark.ray
def test_a_job_whose_values_are_gone_says_so(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from pipeline.jobs.handover import take_values

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    monkeypatch.setenv(VARIABLE, "_ray_pkg_none.zip")
    with pytest.raises(UserError, match=r"no longer there.*Submit it again"):
        take_values()


@pytest.mark.ray
def test_processes_of_a_role_get_them(ray_cluster: None, tmp_path: Path) -> None:
    group = host_group("policy", RoleSpec(), LimitsSpec(), tmp_path, {"SOME_TOKEN": SECRET}).start()
    try:
        assert group.submit_work(0, "os:getenv", "SOME_TOKEN", phase="start").result() == SECRET
    finally:
        group.shutdown()
    held = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text()]
    assert held == []
