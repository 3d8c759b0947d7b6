"""The package of a job: the files that Ray itself would take, its size, and what it can't hold."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from ray._private import ray_constants
from ray._private.runtime_env import packaging

from actors.errors import UserError
from pipeline.jobs.package import EXCLUDES, MIB, collect, limit


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working directory with all kinds of rules, and links."""
    root = tmp_path / "my project, ü"
    for name in (
        ".gitignore", ".rayignore", "run.yaml", "data/rows.jsonl", "data/.gitignore", "data/tmp/x",
        "data/keep.tmp",
        "runs/a/run.json", "sub/runs/kept", ".venv/lib/x.py", ".git/config", "a/__pycache__/x.pyc", "x.pyc",
        "secret.env", "names with blanks/ä ö.txt", "big.bin", "mine.egg-info/x",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / ".gitignore").write_text("*.env\n/data/tmp/\n")
    (root / "data" / ".gitignore").write_text("*.tmp\n!keep.tmp\n")
    (root / ".rayignore").write_text("big.bin\n")
    (root / "empty").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "linked.txt").write_text("by a link")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "broken").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    return root


def rays_own(root: Path, target: Path) -> set[str]:
    """Names that Ray's packaging packs from the same directory."""
    excludes = [*ray_constants.get_runtime_env_default_excludes(), *EXCLUDES]
    packaging.create_package(str(root), target, include_gitignore=True, excludes=excludes)
    return {name.rstrip("/") for name in zipfile.ZipFile(target).namelist()}


def test_what_is_shipped_is_what_ray_would_pack(project: Path, tmp_path: Path) -> None:
    files = set(collect(project).files)
    assert files == rays_own(project, tmp_path / "rays.zip")
    assert {
        "data/rows.jsonl",
        "names with blanks/ä ö.txt",
        "link/linked.txt",
        "empty",
        "sub/runs/kept",
    } <= files
    assert not files & {"secret.env", "big.bin", "data/tmp/x", "runs/a/run.json", ".git/config", "broken"}


def test_rays_variable_ships_what_git_ignores(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    files = set(collect(project).files)
    assert {"secret.env", "data/tmp/x"} <= files
    assert "big.bin" not in files


def test_the_archive_holds_every_file_and_is_no_larger_than_counted(project: Path, tmp_path: Path) -> None:
    package = collect(project)
    package.write(tmp_path / "job.zip")
    with zipfile.ZipFile(tmp_path / "job.zip") as archive:
        names = set(archive.namelist())
        assert archive.read("shipped-files/names with blanks/ä ö.txt").decode() == "names with blanks/ä ö.txt"
    assert {f"shipped-files/{name}" for name in package.files} <= {name.rstrip("/") for name in names}
    assert "pipeline/__main__.py" in names
    size = (tmp_path / "job.zip").stat().st_size
    assert 0 <= package.bytes - size < 200 * len(names)


def test_the_limit_is_that_of_the_installed_ray() -> None:
    assert limit() == ray_constants.DASHBOARD_CLIENT_MAX_SIZE == 100 * MIB
    assert limit() < packaging.GCS_STORAGE_MAX_SIZE


def test_a_merged_model_that_is_too_much_is_refused_with_its_files_and_what_to_ignore(project: Path) -> None:
    (project / "merged").mkdir()
    sizes = {
        "merged/model.safetensors": 3 * 2**30,
        "merged/tokenizer.json": 5 * MIB,
        "data/rows.jsonl": 2 * MIB,
    }
    for name, size in sizes.items():
        (project / name).touch()
        os.truncate(project / name, size)  # sparse: nothing may read it
    (problem,) = collect(project).problems()
    assert "The largest: merged/model.safetensors (3.0 GiB). Name" in problem
    assert "Ray takes 100.0 MiB" in problem
    assert "(e.g. /merged)" in problem
    (project / ".rayignore").write_text("/merged/\nbig.bin\n")
    assert collect(project).problems() == []


def test_links_that_lead_round_and_names_that_ray_loses_are_refused_together(project: Path) -> None:
    (project / "data" / "loop").symlink_to(project)
    (project / "back\\slash").touch()
    Path(os.fsdecode(os.fsencode(project) + b"/\xff.txt")).touch()
    with pytest.raises(UserError) as caught:
        collect(project)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "data/loop: a link that leads back to" in told
    assert told.count("Ray can't ship a file of this name") == 2
    (project / ".rayignore").write_text("loop\nback*\n*.txt\n")
    collect(project)


def test_an_ignore_file_that_is_no_text_is_told(project: Path) -> None:
    (project / ".rayignore").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"\.rayignore can't be read"):
        collect(project)


def test_a_ray_whose_rules_are_unknown_ships_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(packaging, "get_excludes_from_ignore_files")
    with pytest.raises(UserError, match=r"has no .*get_excludes_from_ignore_files.*install ray==2\.60"):
        collect(project)
