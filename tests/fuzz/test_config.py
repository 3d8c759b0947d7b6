"""Whatever a config or an override holds, a run or a message comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from pipeline.config.fields import all_paths
from pipeline.config.load import dump_config, load_config, load_mapping
from pipeline.config.run_config import RunConfig
from pipeline.config.yaml_reader import parse_yaml
from pipeline.stages.specs.registry import STAGE_TYPES
from tests.fuzz.harness import Feed
from tests.fuzz.strategies import altered, damaged, scalars, texts

WORDS = [
    "&a ", "*a", "<<: ", "!!int ", "!!binary ", "!!set ", "!!omap ", "!!timestamp ", "!!float ", "!x ", "! ",
    "? ", ": ", "- ", "[", "]", "{", "}", "|\n", ">\n", "---\n", "...\n", "%YAML 1.1\n", "#", "\t", "\n",
    "'", '"', ".nan", ".inf", "1e400", "2020-01-01", "0x1F", "1_000", "9" * 30, "~", "null", "true",
    "builtin:", "data: ",
]  # fmt: skip


def configs(repository: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((repository / "configs").glob("*.yaml"))]


def keys() -> list[str]:
    """Names of all keys of a run."""
    return sorted({part for path in all_paths(RunConfig) for part in path.split(".")} | set(STAGE_TYPES))


def accepted(config: RunConfig) -> None:
    """A config that was taken can be written down as the run directory has it."""
    dump_config(config).encode()


def test_damaged_files(feed: Feed, repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    words = [word.encode() for word in WORDS] + [f"{key}: ".encode() for key in keys()]

    def load(content: bytes) -> None:
        path.write_bytes(content)
        accepted(load_config(path))

    feed(load, damaged(configs(repository), words), inputs=120)


def test_odd_values_under_known_keys(feed: Feed, repository: Path) -> None:
    good = [parse_yaml(content.decode()) for content in configs(repository)]
    feed(
        lambda data: accepted(load_mapping(dict(data))),
        _mappings(altered(good, scalars(), keys())),
        inputs=120,
        examples=[{**good[0], "seed": _levels(3000)}, {**good[0], "stages": _levels(500)}],
    )


def _levels(number: int) -> Any:
    value: Any = 1
    for _ in range(number):
        value = {"a": value}
    return value


def _mappings(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return strategy.filter(lambda value: isinstance(value, dict))


def overrides() -> st.SearchStrategy[list[str]]:
    paths = [path.replace("STAGE", stage) for path in all_paths(RunConfig) for stage in ("sft", "grpo", "0")]
    key = st.one_of(
        st.sampled_from(paths),
        st.lists(st.one_of(st.sampled_from(keys()), texts(), st.just("0")), min_size=1, max_size=5).map(
            ".".join
        ),
    )
    usual_values = [
        "1",
        "2",
        "0.5",
        "1e-4",
        "true",
        "null",
        "[1]",
        "[base]",
        "{source: x}",
        "x",
        "auto",
        "16",
    ]
    value = st.one_of(
        st.sampled_from(WORDS),
        st.lists(st.sampled_from(WORDS), max_size=5).map("".join),
        texts(),
    )
    usual = st.builds("{}={}".format, st.sampled_from(paths), st.sampled_from(usual_values))
    odd = st.builds("{}={}".format, key, value)
    return st.lists(st.one_of(usual, usual, odd, texts()), min_size=1, max_size=3)


def test_overrides(feed: Feed, repository: Path) -> None:
    path = repository / "configs" / "grpo-tiny.yaml"

    def load(given: Sequence[str]) -> None:
        accepted(load_config(path, given))

    feed(load, overrides(), inputs=120)
