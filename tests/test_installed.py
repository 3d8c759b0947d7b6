"""Raylign installed from a wheel, used outside the repository: what it brings along, and what may hide it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PARTS = ("actors", "pipeline", "assets", "configs", "pyproject.toml", "setup.py", "MANIFEST.in", "raylign.py")
RUN = """
name: here
model: {base: "builtin:tiny-moe"}
stages:
  sft: {data: {source: "builtin:arithmetic", split: train}, max_steps: 2}
"""


@pytest.fixture(scope="module")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but the installed wheel, built from a copy without anything untracked."""
    root = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in (*PARTS, "README.md", "LICENSE"):
        part = repository / name
        if part.is_dir():
            shutil.copytree(part, root / "source" / name, ignore=ignore)
        else:
            shutil.copy(part, root / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    wheel = [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(root), str(root / "source")]
    subprocess.run(wheel, check=True, capture_output=True)
    built = str(next(root.glob("raylign-*.whl")))
    subprocess.run([*pip, "install", *offline, "--target", str(root / "site"), built], check=True)
    return root / "site"


@pytest.fixture
def raylign(site: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the installed command, or `python` with other arguments, in `tmp_path`."""
    # An editable installation of the checkout answers for every module that the wheel lacks.
    custom = tmp_path / "custom"
    custom.mkdir()
    (custom / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
    )

    def start(*arguments: str, path: str = "", python: bool = False) -> subprocess.CompletedProcess[str]:
        places = os.pathsep.join([*filter(None, [path]), str(site), str(custom)])
        env = {**os.environ, "PYTHONPATH": places, "PYTHONSAFEPATH": "", "COLUMNS": "200"}
        command = [sys.executable, *([] if python else [str(site / "bin" / "raylign")]), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    return start


def test_the_packages_come_from_the_wheel(raylign: Any, site: Path) -> None:
    code = "import pipeline, actors; print(pipeline.__file__, actors.__file__)"
    assert all(Path(place).is_relative_to(site) for place in raylign("-c", code, python=True).stdout.split())


def test_every_module_of_the_repository_is_in_the_wheel(site: Path, repository: Path) -> None:
    def modules(root: Path) -> set[str]:
        return {
            str(p.relative_to(root)) for name in ("actors", "pipeline") for p in (root / name).rglob("*.py")
        }

    assert modules(site) == modules(repository)


@pytest.mark.slow
def test_verbs_that_start_nothing_work_in_any_directory(raylign: Any, site: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    env = raylign("env").stdout
    assert f"builtin:tiny-moe, at {site}/actors/assets/tiny-moe" in env
    assert f"{site}/pipeline/configs" in env
    # One process, since most of each is imports.
    verbs = (
        (["init", "mine.yaml", "--stages", "sft,reward,dpo,ppo"], "wrote mine.yaml"),
        (["init", "schema.json", "--schema"], "wrote schema.json"),
        (["validate", "run.yaml"], "run.yaml: fine"),
        (["inspect", "builtin:arithmetic", "--split", "preference", "--rows", "1"], "<|im_start|>"),
        (["inspect", "run.yaml", "--rows", "1"], "sft.data"),
    )
    code = f"from pipeline.cli.app import main; print([main(verb) for verb, says in {verbs!r}])"
    done = raylign("-c", code, python=True)
    assert "[0, 0, 0, 0, 0]" in done.stdout, done.stdout + done.stderr
    for _, says in verbs:
        assert says in done.stdout
    assert json.loads((tmp_path / "schema.json").read_text())["title"] == "RunConfig"


def test_a_config_of_the_repository_is_pointed_to_where_it_is(raylign: Any, site: Path) -> None:
    done = raylign("run", "configs/demo.yaml")
    assert done.returncode == 2
    assert f"is {site}/pipeline/configs/demo.yaml" in done.stderr.replace("\n", "")


def test_a_package_that_hides_ours_on_the_path_is_named(raylign: Any, site: Path, tmp_path: Path) -> None:
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "__init__.py").touch()
    (tmp_path / "pipeline.py").touch()
    done = raylign("--help", path=str(tmp_path))
    assert done.returncode == 2
    for name, place in (("actors", "actors/__init__.py"), ("pipeline", "pipeline.py")):
        assert f"Python finds `{name}` at {tmp_path}/{place}, not at {site}/{name}" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "pipeline.py").unlink()
    module = raylign("-m", "pipeline", "--help", python=True)
    assert module.returncode == 1
    assert "another package named `actors` hides Raylign's" in module.stderr
    assert "Traceback" not in module.stderr


@pytest.mark.ray
def test_a_run_works_beside_packages_of_those_names(raylign: Any, site: Path, tmp_path: Path) -> None:
    """The working directory is on the path of neither the command nor its workers."""
    (tmp_path / "run.yaml").write_text(RUN)
    for name in ("actors", "pipeline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')\n")
    done = raylign("run", "run.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    adapter = json.loads((tmp_path / "runs/here/sft/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == f"{site}/actors/assets/tiny-moe"
    assert (tmp_path / "runs/here/report.html").is_file()


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_verbs_that_train_and_generate_work_in_any_directory(raylign: Any, tmp_path: Path) -> None:
    online = "{data: {source: 'builtin:arithmetic', split: prompts}, rewards: exact_match, max_steps: 1}"
    held_out = "eval: {data: {source: 'builtin:arithmetic', split: test}, max_rows: 16}\n"
    (tmp_path / "run.yaml").write_text(f"{RUN}  grpo: {online}\n{held_out}")
    for arguments in (
        ["run", "run.yaml", "--dry-run"],
        ["run", "run.yaml"],
        ["report", "runs/here"],
        ["eval", "run.yaml", "--models", "base,sft"],
        ["merge", "runs/here/sft/adapter", "merged", "--dtype", "float32"],
        ["chat", "builtin:tiny-moe", "--prompt", "37+45=?"],
        ["chat", "run.yaml", "--model", "grpo", "--prompt", "37+45=?"],
    ):
        done = raylign(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()
