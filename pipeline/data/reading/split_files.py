"""Finds the files of a split in a folder or by a pattern, by the rules of `datasets`.

`datasets` finds splits in this order: the `configs:` of the folder's README, shards in `data/`
(`data/train_sft-00000-of-00002.parquet`), names of folders, names of files. Its own functions do this here;
see https://huggingface.co/docs/datasets/repository_structure. Where they would put files together that most
likely are not one split (train_sft and train_gen, a test file in a folder called train), the source is
refused instead. READMEs are in `pipeline.data.reading.readme_configs`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actors.errors import UserError
from pipeline.data.reading.raw_rows import SUFFIXES, stem_of, suffix_of

MOST_ENTRIES = 50_000
"""Files and folders below a folder that is looked through for data."""
NAMED = 8
"""Files that a message names; of more it gives the number."""

_SHARD = re.compile(r"([-._ ]\d+)?([-._ ]of[-._ ]\d+)?([-._ ][0-9a-f]{16})?$")
"""End of a shard's name: `-00000-of-00002`, and the fingerprint that older versions of the hub added."""

_NUMBER = re.compile(r"\d*|of|(part|shard|chunk|file|batch|rank)\d*|[0-9a-f]{8,}")
"""Words after `train` that only number the parts of one split."""


@dataclass(frozen=True)
class Splits:
    """The data files under `base`, by split."""

    source: str
    base: Path
    files: list[Path]
    """All of them, in the order of `datasets`: sorted by path."""
    by_split: dict[str, list[Path]] = field(default_factory=dict)
    by_names: bool = False
    """True: the splits were found by words in names of files and folders, not by a README or shards."""


def files_of_pattern(source: str, split: str) -> list[Path]:
    """Files of one split among those that a pattern matches; `train` is all if no name says otherwise.

    Raises:
        UserError: nothing matches, or the matches are not clearly of one split.
    """
    path = Path(source).expanduser()
    base = Path(*[part for part in path.parts[:1] if part == path.anchor])
    for part in path.parts[
        len(base.parts) : -1
    ]:  # an existing folder with brackets in its name is no pattern
        if glob.has_magic(part) and not (base / part).is_dir():
            break
        base /= part
    matches = resolve(str(path.relative_to(base)), base, source)
    if not matches:
        raise UserError(f"data source {source!r}: no file matches this pattern")
    matches = [p for p in matches if suffix_of(p)]
    if not matches:
        raise UserError(f"data source {source!r}: matches no {', '.join(SUFFIXES)} file")
    splits = splits_of(base, source, matches)
    said = {frozenset(_said(p.relative_to(base))) for p in matches}
    if split == "train" and (said <= {frozenset(), frozenset(["train"])} or len(said) == 1 == len(*said)):
        only = next(iter(*said), "train") if len(said) == 1 else "train"
        _refuse_several_names(splits, only, matches)
        return one_form(matches, source)
    named = {p for files in splits.by_split.values() for p in files}
    unnamed = [p for p in matches if p not in named]
    if unnamed and split in splits.by_split:
        raise UserError(
            f"data source {source!r}: matches files of no split ({names_of(unnamed, base)}) beside others "
            f"({overview(splits)}); write a pattern for the files of one split, or list the files as sources"
        )
    return one_split(splits, split)


def splits_of(base: Path, source: str, among: Sequence[Path] | None = None) -> Splits:
    """The splits that `datasets` finds under `base` in visible data files, or in those of `among`.

    Raises:
        UserError: there is no data file, or `datasets` can't be asked for its rule.
    """
    from datasets import __version__, data_files
    from fsspec.utils import glob_translate

    default_patterns = getattr(data_files, "_get_data_files_patterns", None)
    if default_patterns is None:
        raise UserError(
            f"data source {source!r}: datasets {__version__} has no _get_data_files_patterns, which finds "
            "the files of each split (datasets 5.2 has it): name a file itself, or install datasets==5.2.*"
        )

    files = list(among or _data_files(base, source))
    below = {str(p.relative_to(base)): p for p in files}

    def matching(pattern: str) -> list[str]:
        # As `resolve`, which would walk through all folders for each of some 60 patterns.
        found = [name for name in below if re.match(glob_translate(pattern), name)]
        if not found:
            raise FileNotFoundError(pattern)
        return found

    try:
        patterns = default_patterns(matching)
    except ValueError:  # shards of a split whose name `datasets` does not allow, such as `train-sft`
        return Splits(source, base, files)
    by_split: dict[str, list[Path]] = {}
    for split, of_split in patterns.items():
        regular = [glob_translate(pattern) for pattern in of_split]
        found = [p for one in regular for name, p in below.items() if re.match(one, name)]
        by_split[str(split)] = list(dict.fromkeys(found))
    sharded = data_files.SPLIT_PATTERN_SHARDED.format(split=next(iter(patterns)))
    return Splits(source, base, files, by_split, next(iter(patterns.values())) != [sharded])


def _data_files(base: Path, source: str) -> list[Path]:
    files = [p for p in resolve("**", base, source) if suffix_of(p)]
    saved = [p.parent for p in files if p.name == "state.json"]
    if inside := [p for p in files if not any(folder in p.parents for folder in saved)]:
        return inside
    has = f"; name one of its data sets of `save_to_disk`: {names_of(saved, base)}" if saved else ""
    raise UserError(
        f"data source {source!r}: no {', '.join(SUFFIXES)} file and no `save_to_disk` data in it{has}"
    )


def one_split(splits: Splits, split: str) -> list[Path]:
    """Files of one split.

    Raises:
        UserError: there are none, or they are not clearly of this split alone.
    """
    found = splits.by_split.get(split) or []
    if found and splits.by_names:
        _refuse_other_splits(splits, split, found)
        _refuse_several_names(splits, split, found)
    if not found:  # a name that is no word of `datasets`: files or folders that are called exactly so
        found = [p for p in splits.files if _SHARD.sub("", stem_of(p)) == split]
        found = found or [p for p in splits.files if split in p.relative_to(splits.base).parts[:-1]]
        _refuse_other_splits(splits, split, found)
    if not found:
        raise UserError(
            f"data source {splits.source!r}: no files of split {split!r}; found "
            f"{overview(splits)}. Set `split:` to what it should be, or name the files as sources"
        )
    return one_form(found, splits.source)


def _refuse_other_splits(splits: Splits, split: str, files: Sequence[Path]) -> None:
    """Refuse `train/test.jsonl`, and `Test.jsonl`: `datasets` counts both as train."""
    for path in files:
        others = _said(path.relative_to(splits.base)) - {split, *_said(Path(split))}
        if others:
            raise UserError(
                f"data source {splits.source!r}: {names_of([path], splits.base)} counts as split {split!r}, "
                f"but its name says {min(others)!r} too; rename it, or name the files as sources"
            )


def _refuse_several_names(splits: Splits, split: str, files: Sequence[Path]) -> None:
    """Refuse `train_sft.jsonl` beside `train_gen.jsonl`: `datasets` counts both as train."""
    labels = {p: _labels(p.relative_to(splits.base), split) for p in files}
    if len(set(filter(None, labels.values()))) > 1:
        relative = files[-1].relative_to(splits.base)
        parts = [*relative.parts[:-1], _SHARD.sub("", stem_of(relative))]
        one = next((part for part in parts if split in _said(Path(part))), parts[-1])
        raise UserError(
            f"data source {splits.source!r}: no files of split {split!r} alone: "
            f"{names_of(files, splits.base)} have different names; ask for one of them (such as "
            f"`split: {one}`), or list the files as sources"
        )


def _words(split: str) -> str:
    """Pattern of a word that says `split`, as `datasets` looks for it: between separators or at an end."""
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    words = "|".join(next(words for name, words in SPLIT_KEYWORDS.items() if str(name) == split))
    return rf"(?:^|[{NON_WORDS_CHARS}])(?:{words})(?:[{NON_WORDS_CHARS}]|$)"


def _parts(relative: Path) -> list[str]:
    """Folders and stem of a path, with `sumsTrain` and `TRAIN` written as `sums_train` and `train`."""
    parts = [*relative.parts[:-1], stem_of(relative)]
    return [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", part).lower() for part in parts]


def _said(relative: Path) -> set[str]:
    """Splits that words in a path name."""
    names = ("train", "validation", "test")
    return {s for s in names if any(re.search(_words(s), part) for part in _parts(relative))}


def _labels(relative: Path, split: str) -> frozenset[str]:
    """Words behind the split's word in a path, without numbers: `sft` of `train_sft-00000-of-00001`."""
    if split not in ("train", "validation", "test"):
        return frozenset()
    found = [(part, re.search(_words(split), part)) for part in _parts(relative)]
    return frozenset(
        f"{split} "
        + " ".join(w for w in re.split(r"[-._ ]+", part[match.end() :]) if not _NUMBER.fullmatch(w))
        for part, match in found
        if match
    )


def one_form(files: Sequence[Path], source: str) -> list[Path]:
    """`files` once each.

    Raises:
        UserError: the same name twice (a.jsonl and a.jsonl.gz), or files of several forms, of which
            `datasets` would read the most frequent one and drop the rest.
    """
    files = list(dict.fromkeys(files))
    bare: dict[Path, Path] = {}
    for path in files:
        twin = bare.setdefault(path.with_name(stem_of(path)), path)
        if twin != path:
            raise UserError(
                f"data source {source!r}: {twin.name} and {path.name} look like the same rows twice; name one"
            )
    forms = {suffix_of(p).replace("jsonl", "json"): p for p in reversed(files)}
    if len(forms) > 1:
        raise UserError(
            f"data source {source!r}: files of several forms ({names_of(forms.values())}), of "
            "which `datasets` would read one; list the files, or a pattern for each form, as sources"
        )
    return files


def resolve(pattern: str, base: Path, source: str) -> list[Path]:
    """Visible files that match a pattern below `base`, sorted, through `datasets`."""
    from datasets.data_files import resolve_pattern

    absolute = Path(os.path.abspath(base))
    if "**" in pattern:
        _refuse_large(absolute, source)
    try:
        found = resolve_pattern(pattern, base_path=glob.escape(str(absolute)))
    except FileNotFoundError:
        return []
    except Exception as error:  # fsspec's own kinds, for names such as a::b
        raise UserError(f"data source {source!r}: {pattern} can't be looked for: {error}") from error
    return [base / os.path.relpath(path, absolute) for path in sorted(found)]


def _refuse_large(folder: Path, source: str) -> None:
    """Refuse to look for data through a whole disk, which takes minutes."""
    entries = 0
    for _, folders, files in os.walk(folder):
        entries += len(folders) + len(files)
        if entries > MOST_ENTRIES:
            raise UserError(
                f"data source {source!r}: holds more than {MOST_ENTRIES:,} files and folders, which are not "
                "looked through; name the folder in it that has the data, or the files"
            )


def overview(splits: Splits) -> str:
    """Splits with their files, and files of none."""
    named = {p for files in splits.by_split.values() for p in files}
    rest = [p for p in splits.files if p not in named]
    parts = [f"{split} ({names_of(files, splits.base)})" for split, files in splits.by_split.items()]
    return ", ".join(parts + ([f"of no split: {names_of(rest, splits.base)}"] if rest else []))


def names_of(files: Iterable[Path], base: Path | None = None) -> str:
    """The first files by name, or by path below `base`."""
    names = [str(p.relative_to(base)) if base is not None else p.name for p in files]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
