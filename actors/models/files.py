"""Files of models on disk: a directory whole or not at all, weights readable by whom the umask lets read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from actors.errors import RunFailure, UserError

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read as they may any new file.

    Raises:
        OSError: it can't be written; safetensors has an error of its own for that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), file, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{file.name}: {error}") from error
    give_usual_mode(file)


def give_usual_mode(*files: Path) -> None:
    """Give files the mode that a new file beside them has: by umask, or by the directory's own rule.

    safetensors writes a file of mode 0600 aside and renames it: nobody else could read a shared model.
    """
    if not files:
        return
    # The umask of a process can only be read by setting it, which other threads would see.
    new = files[0].with_name(f".{files[0].name}.{os.getpid()}.mode")
    try:
        new.touch()
        mode = new.stat().st_mode & 0o777
    finally:
        new.unlink(missing_ok=True)
    for file in files:
        file.chmod(mode)


@contextmanager
def new_model(out_dir: str | Path) -> Iterator[Path]:
    """Yield a directory beside `out_dir` to write into, which takes that name when the block ends well.

    Of a block that fails nothing is left. What a kill leaves has a hidden name that ends in `.unfinished`;
    the next attempt removes it.

    Raises:
        UserError: `out_dir` is a file, not empty, or a mount point.
        RunFailure: it can't be written.
    """
    final = Path(out_dir).absolute()
    try:
        # A link to an empty directory stays one.
        final = final.resolve()
        _refuse(final, str(out_dir))
        aside = final.with_name(f".{final.name}.unfinished")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"'{out_dir}' can't be written ({error.strerror or error})") from error
    try:
        yield aside
        with writing(out_dir):
            os.rename(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def writing(out_dir: str | Path) -> Iterator[None]:
    """Raise RunFailure where the disk is full or can't be written."""
    try:
        yield
    except OSError as error:
        raise RunFailure(
            "merge",
            "save",
            f"cannot write '{out_dir}': {error.strerror or error}",
            "free space, or name a directory on another disk; nothing of this attempt is left",
        ) from error


def _refuse(final: Path, named: str) -> None:
    if final.is_dir():
        found = sorted(entry.name for entry in final.iterdir())
        if found:
            shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise UserError(
                f"'{named}' is not empty (it holds {shown}); name a new or empty directory for the merged "
                "model, or remove that one first"
            )
        if os.path.ismount(final):
            raise UserError(f"'{named}' is a mount point; name a new directory inside it, '{named}/model'")
    elif final.exists():
        raise UserError(f"'{named}' is a file; name a new or empty directory for the merged model")
