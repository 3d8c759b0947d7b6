"""Finds the files of a split and configuration of a folder: by `configs:` of its README, or by folders."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from actors.errors import UserError
from pipeline.data.reading.raw_rows import SUFFIXES, suffix_of
from pipeline.data.reading.split_files import NAMED, names_of, one_form, one_split, resolve, splits_of

_NOT_ABOUT_READING = {
    "data_files",
    "data_dir",
    "default",
    "version",
    "description",
    "features",
    "drop_labels",
}
"""Keys of a configuration in a README that don't change how its files are read."""


def files_of_folder(folder: Path, name: str | None, split: str, source: str) -> list[Path]:
    """Files of one split of a folder; `name` is a configuration of its README, or a folder in it.

    Raises:
        UserError: no such configuration or split, with what there is; files not clearly of one split.
    """
    configs = _readme_configs(folder, source)
    if configs and (name is None or name in configs):
        return _files_of_config(folder, configs, name, split, source)
    if name is not None and not (name == "default" and not configs):
        inside = folder / name
        if (
            name.startswith(".")
            or PurePath(name).is_absolute()
            or ".." in PurePath(name).parts
            or not inside.is_dir()
        ):
            raise UserError(_no_config(folder, name, configs, source))
        folder = inside
    return one_split(splits_of(folder, source), split)


def _readme_configs(folder: Path, source: str) -> Any:
    """Configurations of the folder's README, as `datasets` reads them; empty without any."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    readme = folder / "README.md"
    try:
        text = readme.read_text(encoding="utf-8-sig") if readme.is_file() else ""
        if not text.lstrip().startswith("---"):
            return {}
        return MetadataConfigs.from_dataset_card_data(DatasetCard(text).data)
    except Exception as error:  # YAML's, huggingface_hub's and datasets' own kinds
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data source {source!r}: the head of {readme} can't be read: {said}") from error


def _files_of_config(folder: Path, configs: Any, name: str | None, split: str, source: str) -> list[Path]:
    from datasets.data_files import sanitize_patterns

    try:
        name = name or configs.get_default_config_name()
    except ValueError as error:
        raise UserError(f"data source {source!r}: README.md: {error}") from error
    if name is None:
        raise UserError(f"data source {source!r}: `name` is missing; its README has {', '.join(configs)}")
    where = f"data source {source!r}, configuration {name!r} of its README"
    if unknown := set(configs[name]) - _NOT_ABOUT_READING:
        raise UserError(
            f"{where}: {', '.join(sorted(unknown))} can't be obeyed here; name the files as sources"
        )
    base = folder / (configs[name].get("data_dir") or "")
    if configs[name].get("data_files") is None:
        return one_split(splits_of(base, source), split)
    patterns = sanitize_patterns(configs[name]["data_files"])
    if split not in patterns:
        raise UserError(f"{where}: no split {split!r}; it has {', '.join(patterns)}")
    files: list[Path] = []
    for pattern in patterns[split]:
        found = [] if "://" in pattern else resolve(pattern, base, source)
        if not found:
            raise UserError(f"{where}: no file matches {pattern!r} of split {split!r} in {base}")
        files += found
    if unread := [p for p in files if not suffix_of(p)]:
        raise UserError(f"{where}: {names_of(unread, folder)}: not a {', '.join(SUFFIXES)} file")
    return one_form(files, source)


def _no_config(folder: Path, name: str, configs: Any, source: str) -> str:
    folders = sorted(
        {p.relative_to(folder).parts[0] for p in resolve("*/**", folder, source) if suffix_of(p)}
    )
    has = f"its README has {', '.join(configs)}" if configs else "its README names none"
    inside = f", and folders with data are {', '.join(folders[:NAMED])}" if folders else ""
    return f"data source {source!r}: no configuration {name!r} (`name`): {has}{inside}"
