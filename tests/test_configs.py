"""Recipes, examples and documentation say what the code does: every config loads, every command parses."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from actors.errors import UserError
from pipeline.cli.app import app
from pipeline.config.load import load_config, resolved, validate
from pipeline.config.run_config import RunConfig
from pipeline.config.yaml_reader import parse_yaml
from pipeline.planning.dry_run import (
    DRY_BATCH,
    DRY_PROMPTS,
    DRY_RL_STEPS,
    DRY_ROWS,
    DRY_STEPS,
    DRY_TOKENS,
    DRY_WORKERS,
    shrink,
)
from pipeline.roles import RolesSpec
from pipeline.stages.specs.registry import DpoStage, GrpoStage, RlStage

ROOT = Path(__file__).resolve().parent.parent
OF_OTHER_PROGRAMS = ("kuberay.yaml",)
"""Files beside the configs that are no run; tests/examples has their tests."""
CONFIGS = sorted(
    path
    for folder in ("configs", "examples")
    for path in (ROOT / folder).glob("*.yaml")
    if path.name not in OF_OTHER_PROGRAMS
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", *ROOT.glob("docs/*.md")]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`((?:PYTHONPATH=\. )?(?:raylign|make|pytest|python -m) [^`]+)`")
HEREDOC = re.compile(r"^([^\n]*<<'(\w+)')\n.*?^\2\n", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
OTHER_PROGRAMS = ("cat", "docker", "kubectl", "mkdir", "pip", "ray", "sbatch", "source")
"""Programs in the documentation that are not this project's."""
SKELETON: dict[str, Any] = {"name": "docs", "model": {"base": "some/base"}, "stages": {"sft": {"data": "x"}}}
"""A run around a fragment of YAML in the documentation."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(path.read_text()) if language in languages]


def commands() -> list[Any]:
    """(words, typed) of every command: typed in a shell block, or mentioned in running text."""
    found = []
    for page in PAGES:
        typed = [line for block in blocks(page, "bash", "sh", "console") for line in shell_lines(block)]
        mentioned = INLINE.findall(FENCE.sub("", page.read_text()))
        for line in dict.fromkeys([*typed, *mentioned]):
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            while words and re.match(r"^[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                name = f"{relative(page)}: {shlex.join(words)[:70]}"
                found.append(pytest.param(words, line in typed, id=name))
    return found


def shell_lines(block: str) -> list[str]:
    """Commands of a shell block: continued lines joined, the content of here-documents left out."""
    return HEREDOC.sub(r"\1\n", block.replace("\\\n", " ")).splitlines()


# --- Configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_every_config_loads_and_survives_being_resolved(path: Path) -> None:
    config = load_config(path)
    again, problems = validate(resolved(config))
    assert not problems
    assert again == config


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_the_dry_run_of_every_config_is_valid_and_small(path: Path) -> None:
    config = load_config(path)
    small, changes = shrink(config)
    assert changes
    assert list(small.stages) == list(config.stages)
    for stage in small.stages.values():
        assert stage.batch_size <= DRY_BATCH
        if isinstance(stage, RlStage):
            assert stage.samples_per_step <= DRY_BATCH
            assert 0 < stage.max_steps <= DRY_RL_STEPS
            assert stage.max_completion_length <= DRY_TOKENS
        assert 0 < stage.max_steps <= DRY_STEPS
        assert all(source.max_rows and source.max_rows <= DRY_ROWS for source in stage.data)
    for name in RolesSpec.model_fields:
        role = getattr(small.roles, name)
        assert role.share or (role.workers <= DRY_WORKERS and not role.gpus and not role.resources)
    assert small.eval is None or small.eval.max_rows <= DRY_PROMPTS
    assert (small.model.dtype, small.ray.address, small.logging.report_to) == ("float32", None, [])
    assert small.output_dir != config.output_dir


def test_no_two_configs_share_a_run_directory() -> None:
    names = [load_config(path).output_dir for path in CONFIGS]
    assert len(set(names)) == len(names)


def test_a_recipe_that_was_not_run_says_so() -> None:
    for path in CONFIGS:
        if any(getattr(load_config(path).roles, role).gpus for role in RolesSpec.model_fields):
            assert "NOT RUN HERE" in path.read_text(), f"{relative(path)} needs GPUs, which no test has"


# --- Documentation ------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "typed"), commands())
def test_every_command_in_the_documentation_parses(words: list[str], typed: bool) -> None:
    program, *arguments = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        known = {*re.findall(r"^([a-z-]+):", makefile, re.MULTILINE), *re.findall(r"\$\((\w+)\)", makefile)}
        assert {word.partition("=")[0] for word in arguments} <= known
    elif program == "raylign":
        parse_verb(arguments, typed=typed)
    elif program == "pytest":
        of_options = [before in ("-m", "-k") for before in ["", *arguments]]
        for word, of_option in zip(arguments, of_options):
            path = word.partition("::")[0]
            assert of_option or word.startswith("-") or (ROOT / path).exists(), path
    elif program == "python":
        program = arguments[1].replace(".", "/") if arguments[0] == "-m" else arguments[0].removesuffix(".py")
        assert any((ROOT / file).is_file() for file in (f"{program}.py", f"{program}/__main__.py")), program
    else:
        assert program in OTHER_PROGRAMS, f"nobody checks {program}"


def parse_verb(arguments: list[str], typed: bool = True) -> None:
    """Parse as the command line would, without running; configs that exist load with their overrides."""
    verb, *rest = arguments
    if verb.startswith("-"):
        return
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    try:
        values = command.make_context(verb, list(rest)).params
    except Exception as error:
        if type(error).__name__ == "MissingParameter" and not typed:
            return  # Running text may name a verb without its arguments.
        raise
    config = str(values.get("config") or values.get("data") or values.get("model") or "")
    if config.startswith(("configs/", "examples/")):
        load_config(ROOT / config, values.get("overrides") or [])


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_relative_link_points_to_a_file_and_a_heading(page: Path) -> None:
    text = COMMENT.sub("", FENCE.sub("", page.read_text()))
    for target in LINK.findall(text):
        if re.match(r"^[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{relative(page)} links to {target}"
        if anchor:
            assert anchor in {slug(heading) for heading in HEADING.findall(file.read_text())}, target


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_yaml_block_is_a_run_or_part_of_one(page: Path) -> None:
    for block in blocks(page, "yaml"):
        fragment = parse_yaml(block)
        assert isinstance(fragment, dict), block
        if not set(fragment) <= set(RunConfig.model_fields):
            fragment = {"stages": around(fragment)}
        config, problems = validate({**SKELETON, **fragment})
        assert not problems, f"{block}\n{problems}"
        assert config is not None


def around(fragment: dict[str, Any]) -> dict[str, Any]:
    """Stages around a few keys of one, as the documentation shows them."""
    keys = set(fragment)
    if keys & (set(GrpoStage.model_fields) - set(DpoStage.model_fields)):
        return {"reward": {"data": "x"}, "grpo": {"data": "x", "rewards": "exact_match", **fragment}}
    kind = "dpo" if {"beta", "loss_type", "reference"} & keys else "sft"
    return {kind: {"data": "x", **fragment}}


def test_the_configuration_page_names_every_key() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    schema = RunConfig.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        for key in model.get("properties", {}):
            assert re.search(rf"`{key}`", text), (
                f"docs/configuration.md does not name `{key}` ({model['title']})"
            )


def test_the_models_page_names_every_architecture() -> None:
    from actors.models.architectures.lookup import ARCHITECTURES, REFUSED

    text = (ROOT / "docs/models-and-moe.md").read_text()
    assert not [name for name in {**ARCHITECTURES, **REFUSED} if f"`{name}`" not in text]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_path_of_the_repository_named_in_the_documentation_exists(page: Path) -> None:
    text = page.read_text()
    named = set(
        re.findall(r"`((?:actors|pipeline|tests|requirements|configs|docs|benchmarks|\.ci)/[\w./-]*)`", text)
    )
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize(
    ("target", "gone"), [("clean", {".ruff_cache", "a/__pycache__"}), ("clean-runs", {"runs/demo"})]
)
def test_caches_and_runs_are_removed_by_different_targets(
    target: str, gone: set[str], tmp_path: Path
) -> None:
    places = {"runs/demo", ".ruff_cache", "a/__pycache__", ".venv/lib/__pycache__", "dist"}
    for place in places:
        (tmp_path / place).mkdir(parents=True)
    subprocess.run(["make", "-f", ROOT / "Makefile", target], cwd=tmp_path, capture_output=True, check=True)
    assert {place for place in places if not (tmp_path / place).exists()} == gone


# --- The examples' own code ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("48/2 = 24\n48+24 = 72\n#### 72", 1.0),
        ("She sold 72", 1.0),
        ("#### 72.0 and then some 5", 1.0),
        ("#### 71", 0.0),
        ("no number", 0.0),
    ],
)
def test_gsm8k_answers_are_compared_by_their_number(completion: str, expected: float) -> None:
    final_answer = example("gsm8k").final_answer
    assert final_answer(prompts=["q"], completions=[completion], answer=["worked\n#### 72"]) == [expected]


def test_score_functions_named_in_configs_exist() -> None:
    for path in CONFIGS:
        config = load_config(path)
        rewarded = [s for s in config.stages.values() if isinstance(s, RlStage)]
        named = [r.source for s in rewarded for r in s.rewards if r.kind == "function"]
        named += [config.eval.metric] if config.eval is not None and ":" in config.eval.metric else []
        for source in named:
            module, function = source.split(":")
            tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_command_check_sees_an_option_and_an_override_that_do_not_exist() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse_verb(["run", "configs/base.yaml", "--dry"])
    with pytest.raises(UserError):
        parse_verb(["run", "configs/base.yaml", "stages.pretrain.beta=1"])


def example(name: str) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
