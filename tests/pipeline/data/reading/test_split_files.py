"""Files of a split of a folder or pattern: those that `datasets` would take, or a refusal."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from pipeline.data.reading import split_files
from pipeline.data.reading.sources import local_files, read_rows
from pipeline.data.spec import DataSpec


def tree(root: Path, names: str) -> Path:
    """Files of one row each, which says the file's name."""
    for name in names.split():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'text\n"{name}"\n' if ".csv" in name else f'{{"text": "{name}"}}\n')
    return root


def chosen(root: Path, source: str = "", **spec: Any) -> str:
    """Names of the files that are read, below `root`."""
    rows = read_rows(DataSpec(source=os.path.join(root, source), **spec), seed=0)
    assert all(str(row.file).endswith(row.values["text"]) for row in rows)
    return " ".join(row.values["text"] for row in rows)


def test_a_datasets_without_its_rule_is_an_error_that_names_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    tree(tmp_path, "train.jsonl test.jsonl")
    monkeypatch.delattr(datasets.data_files, "_get_data_files_patterns")
    monkeypatch.setattr(datasets, "__version__", "5.9.0")
    with pytest.raises(
        UserError, match=r"datasets 5\.9\.0 has no .*_get_data_files_patterns.*datasets==5\.2"
    ):
        chosen(tmp_path, split="train")
    assert chosen(tmp_path, "train.jsonl") == "train.jsonl"


BY_DATASETS_RULE = [
    ("train.jsonl test.jsonl", "train", "train.jsonl"),
    ("train.jsonl test.jsonl", "test", "test.jsonl"),
    ("sums_train.jsonl sums_test.jsonl", "train", "sums_train.jsonl"),
    ("sums_train.jsonl sums_test.jsonl", "test", "sums_test.jsonl"),
    ("a.train.csv a-dev.csv", "validation", "a-dev.csv"),
    ("train/b.jsonl train/a.jsonl test/a.jsonl", "train", "train/a.jsonl train/b.jsonl"),
    ("x/train/a.jsonl x/eval/a.jsonl", "test", "x/eval/a.jsonl"),
    ("b.jsonl a.jsonl", "train", "a.jsonl b.jsonl"),
    ("train-00001-of-00002.jsonl train-00000-of-00002.jsonl", "train",
     "train-00000-of-00002.jsonl train-00001-of-00002.jsonl"),
    ("data/train_sft-00000-of-00001.jsonl data/train_gen-00000-of-00001.jsonl", "train_sft",
     "data/train_sft-00000-of-00001.jsonl"),
    ("algebra/train.jsonl geometry/train.jsonl algebra/test.jsonl", "train",
     "algebra/train.jsonl geometry/train.jsonl"),
    ("train.jsonl .ipynb_checkpoints/train-checkpoint.jsonl .train.jsonl __pycache__/train.jsonl", "train",
     "train.jsonl"),
    ("rows.jsonl train.py test.log dataset_infos.json train.jsonl.bak", "train", "rows.jsonl"),
    ("train_0.jsonl train_1.jsonl test_0.jsonl", "train", "train_0.jsonl train_1.jsonl"),
    ("train.part-1.jsonl train.part-2.jsonl", "train", "train.part-1.jsonl train.part-2.jsonl"),
    ("training-train.jsonl", "train", "training-train.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "split", "read"), BY_DATASETS_RULE)
def test_a_folder_is_read_by_the_rules_of_datasets(tmp_path: Path, names: str, split: str, read: str) -> None:
    assert chosen(tree(tmp_path, names), split=split) == read


@pytest.mark.parametrize(("names", "split", "read"), BY_DATASETS_RULE[:11])
def test_datasets_itself_reads_the_same_rows(tmp_path: Path, names: str, split: str, read: str) -> None:
    import datasets

    cache = tmp_path / "cache"
    data = datasets.load_dataset(str(tree(tmp_path / "set", names)), split=split, cache_dir=str(cache))
    assert sorted(data["text"]) == sorted(read.split())


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        ("train_sft.jsonl train_gen.jsonl", "train_sft", "train_sft.jsonl"),
        ("train_sft/a.jsonl train_gen/a.jsonl", "train_gen", "train_gen/a.jsonl"),
        ("train.jsonl dev.jsonl", "dev", "dev.jsonl"),
        ("train.jsonl hard-00000-of-00002.jsonl hard-00001-of-00002.jsonl", "hard",
         "hard-00000-of-00002.jsonl hard-00001-of-00002.jsonl"),
        ("data/train-sft-00000-of-00001.jsonl data/test-sft-00000-of-00001.jsonl", "train-sft",
         "data/train-sft-00000-of-00001.jsonl"),
    ],
)  # fmt: skip
def test_a_split_is_also_what_is_called_exactly_so(tmp_path: Path, names: str, split: str, read: str) -> None:
    assert chosen(tree(tmp_path, names), split=split) == read


@pytest.mark.parametrize(
    ("names", "split", "said"),
    [
        ("train_sft.jsonl train_gen.jsonl train_prefs.jsonl", "train", "train_gen.jsonl, train_prefs.jsonl"),
        ("train_sft/a.jsonl train_gen/a.jsonl", "train", "such as `split: train_sft`"),
        ("train.jsonl train_socratic.jsonl test.jsonl", "train", "train.jsonl, train_socratic.jsonl"),
        ("data/train_sft-00000-of-00001.jsonl data/test_sft-00000-of-00001.jsonl", "train", "found"),
        ("data/train-sft-00000-of-00001.jsonl data/train-gen-00000-of-00001.jsonl", "train", "train-gen"),
        ("train.jsonl test.jsonl", "validation", "found train .train.jsonl., test .test.jsonl."),
        ("sums.jsonl sums_test.jsonl", "train", "found test .sums_test.jsonl., of no split: sums.jsonl"),
        ("train/train.jsonl train/test.jsonl", "train", "train/test.jsonl counts as .* says 'test'"),
        ("Train.jsonl Test.jsonl", "train", "Test.jsonl counts as split 'train'.* says 'test'"),
        ("mathTrain.jsonl mathTest.jsonl", "train", "mathTest.jsonl"),
        ("train_test.jsonl", "train", "says 'test' too"),
        ("eval/train.jsonl train.jsonl", "train", "eval/train.jsonl counts as .* says 'test'"),
        ("train.jsonl train.jsonl.gz", "train", "the same rows twice"),
        ("train-a/x.jsonl train-a/x.json", "train", "the same rows twice"),
        ("train_0.jsonl train_1.csv", "train", "files of several forms"),
        ("notes.txt", "train", "no .jsonl, .json, .csv, .parquet file"),
        (".hidden/train.jsonl", "train", "no .jsonl, .json, .csv, .parquet file"),
    ],
)  # fmt: skip
def test_a_doubtful_split_is_refused_with_what_there_is(
    tmp_path: Path, names: str, split: str, said: str
) -> None:
    with pytest.raises(UserError) as error:
        chosen(tree(tmp_path, names), split=split)
    assert re.search(said, str(error.value))


def test_a_folder_above_the_source_says_nothing(tmp_path: Path) -> None:
    root = tree(tmp_path / "train" / "sums", "train.jsonl test.jsonl")
    assert chosen(root) == "train.jsonl"
    assert chosen(tree(tmp_path / "test [1]" / "sums", "train.jsonl test.jsonl")) == "train.jsonl"
    assert chosen(tree(tmp_path / ".cache" / "sums", "train.jsonl test.jsonl")) == "train.jsonl"


@pytest.mark.parametrize(
    ("names", "pattern", "split", "read"),
    [
        ("data/train.jsonl data/test.jsonl", "data/*.jsonl", "train", "data/train.jsonl"),
        ("data/train.jsonl data/test.jsonl", "data/*.jsonl", "test", "data/test.jsonl"),
        ("data/train-1.jsonl data/test.jsonl", "data/train-*.jsonl", "train", "data/train-1.jsonl"),
        ("d/test-1.jsonl d/test-2.jsonl", "d/test-*.jsonl", "train", "d/test-1.jsonl d/test-2.jsonl"),
        ("d/test-1.jsonl d/test-2.jsonl", "d/test-*.jsonl", "test", "d/test-1.jsonl d/test-2.jsonl"),
        ("train/a.jsonl test/a.jsonl", "*/a.jsonl", "train", "train/a.jsonl"),
        ("data/b.jsonl data/a.jsonl", "data/*", "train", "data/a.jsonl data/b.jsonl"),
        ("data/train.jsonl data/more.jsonl", "data/*.jsonl", "train", "data/more.jsonl data/train.jsonl"),
        ("train/x.jsonl train/test.jsonl", "train/x*.jsonl", "train", "train/x.jsonl"),
        ("d/train_sft.jsonl d/train_gen.jsonl", "d/*.jsonl", "train_sft", "d/train_sft.jsonl"),
    ],
)  # fmt: skip
def test_a_pattern_is_read_by_split(tmp_path: Path, names: str, pattern: str, split: str, read: str) -> None:
    assert chosen(tree(tmp_path, names), pattern, split=split) == read


@pytest.mark.parametrize(
    ("names", "pattern", "split", "said"),
    [
        ("d/train.jsonl d/test.jsonl d/more.jsonl", "d/*.jsonl", "train", "files of no split .more.jsonl."),
        ("d/sums.jsonl d/sums_test.jsonl", "d/*.jsonl", "train", "no files of split 'train'; found test"),
        ("d/train_sft.jsonl d/train_gen.jsonl", "d/*.jsonl", "train", "train_gen.jsonl, train_sft.jsonl"),
        ("d/a.jsonl", "d/*.jsonl", "test", "no files of split 'test'; found train .a.jsonl."),
        ("d/a.txt", "d/*", "train", "matches no .jsonl"),
        ("d/a.txt", "d/*.jsonl", "train", "no file matches"),
        ("d/train.jsonl d/train.csv", "d/train*", "train", "the same rows twice"),
    ],
)
def test_a_doubtful_pattern_is_refused(
    tmp_path: Path, names: str, pattern: str, split: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        chosen(tree(tmp_path, names), pattern, split=split)


def test_brackets_in_a_name_are_no_pattern_where_the_file_exists(tmp_path: Path) -> None:
    tree(tmp_path, "rows[1].jsonl rows1.jsonl")
    assert chosen(tmp_path, "rows[1].jsonl") == "rows[1].jsonl"
    assert chosen(tmp_path, "rows[0-9].jsonl") == "rows1.jsonl"
    tree(tmp_path, "set[1]/a.jsonl set1/b.jsonl")
    assert chosen(tmp_path, "set[1]/*.jsonl") == "set[1]/a.jsonl"
    assert chosen(tmp_path, "set[0-9]/*.jsonl") == "set1/b.jsonl"


def test_links_are_followed_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    tree(tmp_path, "blobs/0a blobs/0b")
    snapshot = tmp_path / "snapshots" / "main"
    (snapshot / "data").mkdir(parents=True)
    for name, blob in (("train", "0a"), ("test", "0b")):
        (snapshot / "data" / f"{name}-00000-of-00001.jsonl").symlink_to(tmp_path / "blobs" / blob)
    (tmp_path / "link").symlink_to(snapshot)
    for source in (snapshot, tmp_path / "link"):
        rows = read_rows(DataSpec(source=str(source)), seed=0)
        assert [row.values["text"] for row in rows] == ["blobs/0a"]


def test_a_folder_of_saved_data_sets_says_so(tmp_path: Path) -> None:
    import datasets

    for split in ("train", "test"):
        datasets.Dataset.from_list([{"text": split}]).save_to_disk(str(tmp_path / split))
    with pytest.raises(UserError, match="name one of its data sets of `save_to_disk`: test, train"):
        chosen(tmp_path)


CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/tr*.jsonl}
  - {split: held_out, path: [main/b.jsonl, main/c.jsonl]}
- config_name: socratic
  data_dir: socratic
- config_name: odd
  data_files: odd.csv
  sep: ";"
- config_name: lost
  data_files: lost-*.jsonl
- config_name: far
  data_files: "hf://datasets/org/name/train.jsonl"
---
A set.
"""


def test_name_is_a_configuration_of_the_readme(tmp_path: Path) -> None:
    tree(
        tmp_path, "main/tr1.jsonl main/b.jsonl main/c.jsonl socratic/train.jsonl socratic/test.jsonl odd.csv"
    )
    (tmp_path / "README.md").write_text(CARD)
    assert chosen(tmp_path, name="main") == "main/tr1.jsonl"
    assert chosen(tmp_path, name="main", split="held_out") == "main/b.jsonl main/c.jsonl"
    assert chosen(tmp_path, name="socratic") == "socratic/train.jsonl"
    refused = {
        None: "`name` is missing; its README has main, socratic, odd",
        "other": "no configuration 'other'.*its README has main, socratic",
        "odd": "sep can't be obeyed",
        "lost": "no file matches 'lost-",
        "far": "no file matches 'hf://",
    }
    for name, said in refused.items():
        with pytest.raises(UserError, match=said):
            chosen(tmp_path, name=name)
    with pytest.raises(UserError, match="no split 'test'; it has train, held_out"):
        chosen(tmp_path, name="main", split="test")


def test_the_default_configuration_is_the_readmes(tmp_path: Path) -> None:
    tree(tmp_path, "a/x.jsonl b/x.jsonl")
    configs = "- {config_name: a, data_files: a/*}\n- {config_name: b, data_files: b/*, default: true}\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert chosen(tmp_path) == "b/x.jsonl"
    assert chosen(tmp_path, name="a") == "a/x.jsonl"


def test_name_is_a_folder_where_no_readme_names_configurations(tmp_path: Path) -> None:
    tree(tmp_path, "main/train.jsonl main/test.jsonl socratic/train.jsonl docs/a.txt")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert chosen(tmp_path, name="main") == "main/train.jsonl"
    assert chosen(tmp_path, name="main", split="test") == "main/test.jsonl"
    with pytest.raises(UserError, match=r"no configuration 'man'.*folders with data are main, socratic$"):
        chosen(tmp_path, name="man")
    with pytest.raises(UserError, match=r"no configuration '../x'"):
        chosen(tmp_path, name="../x")


def test_a_damaged_readme_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "train.jsonl")
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(UserError, match=r"the head of .*README\.md can't be read"):
        chosen(tmp_path)


def test_name_is_refused_where_there_are_no_configurations(tmp_path: Path) -> None:
    import datasets

    tree(tmp_path, "a.jsonl")
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "a.jsonl", tmp_path / "saved", tmp_path / "*.jsonl", "builtin:arithmetic"):
        with pytest.raises(UserError, match=r"`name` is 'main', but .* has no configurations"):
            read_rows(DataSpec(source=str(source), name="main"), seed=0)


def test_a_saved_data_set_has_its_own_split_only(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"text": "a"}], split=datasets.Split.TEST)
    data.save_to_disk(str(tmp_path / "saved"))
    for split in ("train", "test"):
        assert len(read_rows(DataSpec(source=str(tmp_path / "saved"), split=split), seed=0)) == 1
    with pytest.raises(UserError, match="in its own, 'test'; it has no split 'validation'"):
        read_rows(DataSpec(source=str(tmp_path / "saved"), split="validation"), seed=0)


def test_relative_sources_keep_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "set/train.jsonl set/test.jsonl train.jsonl")
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p in local_files(DataSpec(source="set")) or []] == ["set/train.jsonl"]
    assert [str(p) for p in local_files(DataSpec(source="./set/*.jsonl")) or []] == ["set/train.jsonl"]
    assert [str(p) for p in local_files(DataSpec(source="tr*.jsonl")) or []] == ["train.jsonl"]
    monkeypatch.chdir(tmp_path / "set")
    assert [str(p) for p in local_files(DataSpec(source="../tr*.jsonl")) or []] == ["../train.jsonl"]


def test_a_folder_with_a_whole_disk_in_it_is_not_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_files, "MOST_ENTRIES", 3)
    (tmp_path / "a").mkdir()
    for number in range(3):
        (tmp_path / "a" / f"{number}.jsonl").write_text('{"text": "a"}\n')
    assert len(read_rows(DataSpec(source=f"{tmp_path}/a"), seed=0)) == 3
    with pytest.raises(UserError, match="holds more than 3 files and folders"):
        read_rows(DataSpec(source=str(tmp_path)), seed=0)
