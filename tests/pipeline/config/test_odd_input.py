"""Nothing that a config can hold ends in a traceback: odd scalars, misplaced keys, huge numbers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.errors import UserError
from pipeline.config.load import load_config, validate
from pipeline.stages.specs.registry import STAGE_TYPES

ODD = [
    "2020-01-01", "0o17", "1:30:00", "!!binary aGk=", "!!binary '%%'", "!!set {a, b}", "!!omap [a: 1]",
    "!!timestamp 2001-12-14", "!!timestamp x", "!!int x", "!!int ''", "!!float x", "!!bool maybe", "!!null x",
    "!!python/object:os.system x", "&a [*a]", "&a {b: *a}", "*nope", "~", ".nan", ".inf", "1e400", "9" * 30,
    "-" + "9" * 30, "9" * 5000, '"\\x00"', '"\\ud800"', '"\\x1b[31m"', "[]", "{}", "[[]]", "{1: 2}",
    "{null: 1}", "{[1]: 2}", "{{a: 1}: 2}", "{a: 1, a: 2}", "<<: 1", "{<<: [1]}", "{<<: *x}", "{<<: {a: 1}}",
    "yes", "0x1F", "|\n  x", "%", "@x", "`x`", "!x y", "=", "a: b: c", "\t", "---", "x" * 5000,
    "[" * 1500, "é",
]  # fmt: skip
"""Values as they may be typed after a key."""
KEYS = [
    "split",
    "payload",
    "weight",
    "source",
    "null",
    "1",
    "1.5",
    "<<",
    "[1]",
    "2020-01-01",
    "type",
    "stages",
]


def texts(repository: Path) -> list[str]:
    return [path.read_text() for path in sorted((repository / "configs").glob("*.yaml"))]


def read(path: Path, content: bytes) -> str:
    """What is said about a config; nothing where it is fine."""
    path.write_bytes(content)
    try:
        load_config(path)
    except UserError as error:
        said = error.problems
    else:
        return ""
    assert all(len(problem) < 2_000 for problem in said)
    return "\n".join(said)


@pytest.mark.parametrize("value", ODD, ids=lambda value: value[:24].encode("unicode_escape").decode())
def test_an_odd_value_is_a_message_wherever_it_stands(tmp_path: Path, value: str) -> None:
    shape = "name: {}\nseed: {}\nmodel: {}\nstages:\n  sft: {}\n"
    good = ["a", "1", "{base: b}", "{data: d}"]
    for place in range(len(good)):
        values = [value if i == place else kept for i, kept in enumerate(good)]
        read(tmp_path / "run.yaml", shape.format(*values).encode("utf-8", "surrogatepass"))
    deep = f"name: a\nmodel: {{base: b}}\nstages:\n  sft:\n    data:\n      source: {value}\n"
    read(tmp_path / "run.yaml", deep.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("seed", range(4))
def test_ready_configs_with_a_key_or_value_put_in_at_random_are_read_or_refused(
    repository: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        lines = rng.choice(texts(repository)).splitlines()
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        new = f"{key}{colon} {rng.choice(ODD)}" if rng.random() < 0.5 else f"{indent}{rng.choice(KEYS)}: 1"
        lines[at : at + rng.randrange(2)] = [new]
        read(tmp_path / "run.yaml", "\n".join(lines).encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"name: \xe9", b"\x00", b"", b"- a", b"a", b"\xef\xbb\xbf"])
def test_a_file_that_is_no_text_or_no_mapping_is_named(tmp_path: Path, content: bytes) -> None:
    assert str(tmp_path / "run.yaml") in read(tmp_path / "run.yaml", content)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("!!int x", "line 1, column 7: 'x' is no int"),
        ("!!bool maybe", "'maybe' is no bool"),
        ("!!timestamp x", "'x' is no timestamp"),
        ("1e400", "1e400 is too large: numbers reach to 1.8e308"),
        ("9" * 5000, "a number of 5,000 digits is too large: whole numbers reach to 9223372036854775807"),
        ("&a [*a]", "an alias (`*name`) stands inside the value that it names"),
        ("[" * 1500, "too many levels in each other"),
    ],
)
def test_the_message_says_what_is_wrong_and_where(tmp_path: Path, value: str, said: str) -> None:
    assert said in read(tmp_path / "run.yaml", f"seed: {value}\n".encode())


def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    said = read(tmp_path / "run.yaml", "\n".join(lines).encode())
    assert "its aliases stand for more than 1,000,000 values" in said


def test_a_whole_number_that_is_too_large_is_named_with_its_key_and_once() -> None:
    data: dict[str, Any] = {"name": "a", "seed": 10**30, "model": {"base": "b"}, "sed": 1}
    data["stages"] = {"sft": {"data": "d", "max_steps": -(10**30)}}
    said = {problem.path: problem.message for problem in validate(data)[1]}
    assert set(said) == {"seed", "stages.sft.max_steps", "sed"}
    assert "is too large: whole numbers reach to 9223372036854775807" in said["seed"]


def sections(kind: str) -> dict[str, str]:
    """Keys of a type's sections that the stage itself doesn't have -> a section that has them."""
    from pipeline.config.fields import all_paths

    paths = [path.split(".") for path in all_paths(STAGE_TYPES[kind])]
    own = {path[0] for path in paths}
    return {path[1]: path[0] for path in reversed(paths) if len(path) == 2 and path[1] not in own}


@pytest.mark.parametrize("kind", sorted(STAGE_TYPES))
def test_keys_of_a_section_written_on_the_stage_itself_are_sent_there(kind: str) -> None:
    assert sections(kind)
    for key, section in sections(kind).items():
        data = {"name": "a", "model": {"base": "b"}, "stages": {kind: {"data": "d", "rewards": "e", key: 1}}}
        said = {problem.path: problem.message for problem in validate(data)[1]}[f"stages.{kind}.{key}"]
        assert f"`stages.{kind}.{section}.{key}`" in said or "did you mean" in said or "; " in said, said


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("sft.split", "belongs to `stages.sft.data.split`, as in `data: {source: ..., split: ...}`"),
        ("grpo.payload", "belongs to `stages.grpo.sync.payload`"),
        ("grpo.weight", "or to `stages.grpo.rewards.weight`, as in `rewards: {source: ..., weight: ...}`"),
        ("grpo.data.payload", "belongs to `stages.grpo.sync.payload`"),
        (
            "sft.payload",
            "belongs to `sync.payload` of stages of type ppo, grpo, rloo, reinforce_pp, online_dpo and",
        ),
        ("sft.beta", "belongs to `stages of type dpo, kto, ppo,"),
    ],
)
def test_a_key_in_the_wrong_place_is_told_its_own(tmp_path: Path, key: str, said: str) -> None:
    stage, _, rest = key.partition(".")
    inner = {"data": {"source": "d"}, **({"rewards": "exact_match"} if stage == "grpo" else {})}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"name": "a", "model": {"base": "b"}, "stages": {stage: inner}}))
    with pytest.raises(UserError) as refused:
        load_config(path, [f"stages.{stage}.{rest}=1"])
    assert any(said in problem for problem in refused.value.problems), refused.value.problems


def test_a_value_over_the_file_that_is_no_yaml_says_why(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nmodel: {base: b}\nstages: {sft: {data: d}}")
    with pytest.raises(UserError, match=r"seed: '1e400' is not a YAML value: 1e400 is too large"):
        load_config(path, ["seed=1e400"])


@pytest.mark.parametrize("directory", ["a\0b", "\ud800"])
def test_a_run_directory_that_no_disk_has_is_refused(directory: str) -> None:
    data = {"name": "a", "output_dir": directory, "model": {"base": "b"}, "stages": {"sft": {"data": "d"}}}
    (problem,) = validate(data)[1]
    assert problem.path == "output_dir"
    assert "has a character that no path has" in problem.message


def test_more_epochs_than_steps_can_be_counted_are_refused() -> None:
    data = {"name": "a", "model": {"base": "b"}, "stages": {"sft": {"data": "d", "num_train_epochs": 1e18}}}
    assert [str(problem) for problem in validate(data)[1]] == [
        "stages.sft.num_train_epochs: 1e+18 must be at most 1e+06"
    ]
