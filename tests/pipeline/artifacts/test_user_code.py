"""The code of a user's functions: which files it is, and that stages and evaluations run again with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.artifacts.identity import Identity, decide
from pipeline.artifacts.manifest import new_directory, write_json
from pipeline.artifacts.user_code import code_digest, code_of
from pipeline.config.run_config import RunConfig
from pipeline.evaluation.held_out import changed_code, finished
from pipeline.planning.nodes import reward_functions, stage_identity
from tests.pipeline.artifacts.checkpoints import checkpoint_manifest

REWARD = (
    "from helper import sign\n\ndef f(completions, **_):\n    return [sign * len(c) for c in completions]\n"
)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a reward function, and a module beside it that it imports."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(REWARD)
    (folder / "helper.py").write_text("sign = 1\n")
    (folder / "other.py").write_text("unused = 1\n")
    monkeypatch.chdir(folder)
    return folder


def identity(source: str | dict[str, object] = "mine:f", stage: str = "grpo") -> Identity:
    config = RunConfig.model_validate(
        {
            "name": "r",
            "model": {"base": "b"},
            "stages": {stage: {"data": "builtin:arithmetic", "rewards": [source], "batch_size": 16}},
        }
    )
    return stage_identity(config, config.stages[stage], {"base": "abc"}, "data", 0)


def saved(directory: Path, who: Identity, where: str = ".") -> None:
    manifest = checkpoint_manifest(who, 4, "grpo")
    if where == ".":
        write_json(directory / "manifest.json", manifest.model_dump())
    else:
        with new_directory(directory / where, manifest) as aside:
            (aside / "weights").write_text("w")


def test_a_judge_s_template_belongs_to_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    judge = {"kind": "judge", "endpoint": "http://a/v1", "model": "m", "prompt": "judge.txt"}
    (tmp_path / "judge.txt").write_text("{completion}")
    saved(tmp_path, identity(judge))
    assert decide(tmp_path, identity(judge | {"retries": 1})).state == "fresh"
    (tmp_path / "judge.txt").write_text("Is it good? {completion}")
    assert decide(tmp_path, identity(judge)).says == "runs again: changed code of judge.txt"


@pytest.mark.parametrize("where", [".", "checkpoint-4"])
@pytest.mark.parametrize(
    ("file", "text"), [("mine.py", REWARD.replace("sign *", "-sign *")), ("helper.py", "sign = -1\n")]
)
def test_a_stage_whose_reward_function_was_edited_runs_again_and_says_so(
    mine: Path, tmp_path: Path, where: str, file: str, text: str
) -> None:
    (tmp_path / "run").mkdir()
    saved(tmp_path / "run", identity(), where)
    assert decide(tmp_path / "run", identity()).state in ("fresh", "partial")
    (mine / file).write_text(text)
    decision = decide(tmp_path / "run", identity())
    assert decision.says == "runs again: changed code of mine:f"
    assert decision.checkpoint is None


def test_a_file_that_the_function_does_not_import_is_no_change(mine: Path, tmp_path: Path) -> None:
    before = identity()
    (mine / "other.py").write_text("unused = 2\n")
    assert identity() == before


def test_the_folder_in_which_the_code_lies_is_no_change(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = code_digest("mine:f")
    mine.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert code_digest("mine:f") == before is not None


@pytest.mark.parametrize("where", [".", "checkpoint-4"])
def test_a_stage_of_the_version_before_goes_on_whatever_the_code_was(
    mine: Path, tmp_path: Path, where: str
) -> None:
    now = identity()
    settings = {key: value for key, value in now.config.items() if key != "code"}
    before = Identity(settings, now.inputs, now.data, now.seed)
    (tmp_path / "run").mkdir()
    saved(tmp_path / "run", before, where)
    decision = decide(tmp_path / "run", now)
    assert (decision.state, decision.changed) == ("fresh" if where == "." else "partial", [])
    # Later stages name it as an input by the fingerprint that it had.
    assert decision.identity is not None
    assert decision.identity.fingerprint == before.fingerprint != now.fingerprint


def test_exact_match_and_offline_stages_have_no_code() -> None:
    assert "code" not in identity("exact_match").config
    config = RunConfig.model_validate(
        {"name": "r", "model": {"base": "b"}, "stages": {"sft": {"data": "builtin:arithmetic"}}}
    )
    assert reward_functions(config.stages["sft"]) == []


def files(source: str) -> list[str]:
    code = code_of(source)
    return sorted(code.files) if code is not None else []


def test_imports_are_followed_wherever_and_however_they_stand(mine: Path) -> None:
    (mine / "pkg" / "deep").mkdir(parents=True)
    (mine / "pkg" / "__init__.py").write_text("from . import at_start\n")
    (mine / "pkg" / "at_start.py").write_text("")
    (mine / "pkg" / "deep" / "__init__.py").write_text("")
    (mine / "pkg" / "deep" / "score.py").write_text(
        "import json, torch\nfrom ..rules import limit\nfrom ns.sub import part\n"
        "def f(completions):\n    import late.one\n    import importlib\n"
        "    importlib.import_module('by_name')\n    return []\n"
    )
    (mine / "pkg" / "rules.py").write_text("import pkg.deep.score\nlimit = 1\n")
    (mine / "late").mkdir()
    (mine / "late" / "__init__.py").write_text("")
    (mine / "late" / "one.py").write_text("")
    (mine / "ns" / "sub").mkdir(parents=True)
    (mine / "ns" / "sub" / "part.py").write_text("")
    (mine / "by_name.py").write_text("this is no Python")
    assert files("pkg.deep.score:f") == [
        *("by_name", "late", "late.one", "ns.sub.part"),
        *("pkg", "pkg.at_start", "pkg.deep", "pkg.deep.score", "pkg.rules"),
    ]
    assert "pkg" not in sys.modules


def test_raylign_and_installed_packages_are_not_followed(mine: Path) -> None:
    (mine / "mine.py").write_text(
        "import numpy\nfrom pipeline.rewards.exact_match import exact_match as f\nimport os.path\n"
    )
    assert files("mine:f") == ["mine"]


def test_of_an_installed_package_only_the_folder_of_the_module_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages"
    for name, text in {
        "lib_a/__init__.py": "",
        "lib_a/large.py": "",
        "lib_a/rewards/__init__.py": "from lib_a.rewards.one import f\nimport lib_a.large, lib_b\n",
        "lib_a/rewards/one.py": "",
        "lib_b.py": "import lib_a\n",
    }.items():
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text(text)
    monkeypatch.syspath_prepend(installed)
    assert files("lib_a.rewards:f") == ["lib_a.rewards", "lib_a.rewards.one"]
    assert files("lib_b:f") == ["lib_b"]


@pytest.mark.parametrize("source", ["no_such_module_here:f", "mine.no_package:f", "sys:f", "json.no_such:f"])
def test_code_that_can_not_be_found_is_no_entry(mine: Path, source: str) -> None:
    assert code_digest(source) is None
    assert "code" not in identity(source).config


def test_a_module_that_fails_when_it_is_imported_or_is_no_text_has_a_digest(mine: Path) -> None:
    (mine / "broken.py").write_text("1 / 0\n")
    (mine / "odd.py").write_bytes(b"\x00\xff\xfe not python")
    assert code_digest("broken:f") is not None
    assert code_digest("odd:f") is not None


def test_an_evaluation_runs_again_when_its_metric_was_edited(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("")
    before = {"mine:f": str(code_digest("mine:f"))}
    (mine / "helper.py").write_text("sign = -1\n")
    after = {"mine:f": str(code_digest("mine:f"))}
    for kept, again in ((before, True), (after, False), (None, False)):
        entry = {"fingerprint": "k", "n": 3, "metric": "m", "accuracy": 0.5, "ci95": [0.1, 0.9]}
        entry |= {"code": kept} if kept else {}
        (tmp_path / "m.json").write_text(json.dumps(entry))
        assert (finished(tmp_path, "m", "k", after) is None) == again
        assert changed_code(tmp_path, "m", "k", after) == again
        assert not changed_code(tmp_path, "m", "another key", after)
