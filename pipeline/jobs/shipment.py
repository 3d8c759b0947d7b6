"""The job that `raylign submit` sends to a cluster: command, environment, package. Needs no cluster."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.data.spec import DataSpec

EXCLUDES = (
    "/runs/",
    "/.venv/",
    "/venv/",
    ".git/",
    "__pycache__/",
    "*.pyc",
    ".pytest_cache/",
    ".mypy_cache/",
    ".ruff_cache/",
    "*.egg-info/",
)
"""Left out of the package, as are the patterns of .gitignore files: results, environments, history."""

NAME_KEY, OUTPUT_KEY = "raylign_run", "raylign_output_dir"
"""Keys of the job's metadata, by which `status`, `logs` and `stop` find a run by its name."""


@dataclass(frozen=True)
class Shipment:
    """Everything that a job needs."""

    arguments: list[str]
    runtime_env: dict[str, Any]
    metadata: dict[str, str]

    def entrypoint(self, python: str = "python") -> str:
        """The shell command of the job."""
        return shlex.join([python, "-m", "pipeline", *self.arguments])


def plan_shipment(
    config: RunConfig,
    config_path: Path,
    overrides: Sequence[str],
    flags: Sequence[str],
    working_dir: Path,
) -> Shipment:
    """The job that runs `config` from a copy of `working_dir`.

    Raises:
        UserError: the config, the base or data will not be where the job looks for them, or the
            output directory is relative: it would be lost with Ray's temporary copy.
    """
    problems = [
        *_output_problems(config),
        *_missing_from_package("CONFIG", config_path, working_dir),
        *_hidden_packages(working_dir),
        *_embedded_base_stays(config, working_dir),
        *(
            p
            for what, path in _relative_inputs(config)
            for p in _missing_from_package(what, path, working_dir)
        ),
    ]
    if problems:
        raise UserError(problems)
    inside = config_path.resolve().relative_to(working_dir.resolve())
    return Shipment(
        ["run", str(inside), *overrides, "ray.address=auto", *flags],
        {
            "working_dir": str(working_dir),
            "excludes": list(EXCLUDES),
            "env_vars": {"PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"},
            **_own_code(working_dir),
        },
        {NAME_KEY: config.name, OUTPUT_KEY: str(config.output_dir)},
    )


def stop_command(output_dir: str, seconds: float, every: float = 2.0) -> str:
    """Shell command that asks the run in `output_dir` to save and stop, `every` so many seconds for a while.

    Once is not enough: a run that is still starting clears an old request. It never makes the
    directory, or a run that has not begun would find it occupied.
    """
    stop_file = shlex.quote(str(Path(output_dir) / "STOP"))
    directory = shlex.quote(output_dir)
    return (
        f"i=0; while [ $i -lt {max(1, int(seconds / every))} ]; do "
        f"[ -d {directory} ] && touch {stop_file}; i=$((i+1)); sleep {every:g}; done"
    )


def _output_problems(config: RunConfig) -> Iterator[str]:
    if not config.output_dir.is_absolute():
        yield (
            f"output_dir: {config.output_dir} is relative; on the cluster it would land in Ray's temporary "
            "copy and be lost. Name a directory that outlives the job and that every node sees, e.g. "
            f"output_dir=/mnt/shared/{config.name}"
        )


def _relative_inputs(config: RunConfig) -> Iterator[tuple[str, Path]]:
    base = Path(config.model.base)
    if not base.is_absolute() and base.exists():
        yield "model.base", base
    for name, stage in config.stages.items():
        for field, sources in (("data", stage.data), ("eval_data", stage.eval_data or [])):
            yield from ((f"stages.{name}.{field}", path) for spec in sources for path in _local(spec))
    if config.eval is not None:
        yield from (("eval.data", path) for spec in config.eval.data for path in _local(spec))


def _local(spec: DataSpec) -> list[Path]:
    from pipeline.data.reading.sources import local_files

    if spec.source.startswith("builtin:") or Path(spec.source).expanduser().is_absolute():
        return []
    return local_files(spec) or []


def _missing_from_package(what: str, path: Path, working_dir: Path) -> Iterator[str]:
    """Problems of a file or directory that the package will not hold."""
    resolved, root = path.resolve(), working_dir.resolve()
    if not resolved.is_relative_to(root):
        yield (
            f"{what}: {path} lies outside {root}, which is what is shipped; move it there, or give an "
            "absolute path that every node sees"
        )
        return
    inside = resolved.relative_to(root)
    top = f"/{inside.parts[0]}/" if inside.parts else ""
    if top in EXCLUDES or any(f"{part}/" in EXCLUDES for part in inside.parts):
        yield (
            f"{what}: {path} is not shipped ({inside.parts[0]}/ stays here); give an absolute path that "
            "every node sees"
        )
    elif _git_ignores(resolved, root):
        yield (
            f"{what}: {path} is not shipped, because .gitignore excludes it; move it, or give an absolute "
            "path that every node sees"
        )


def _git_ignores(path: Path, root: Path) -> bool:
    try:
        asked = subprocess.run(
            ["git", "-C", str(root), "check-ignore", "-q", str(path)], capture_output=True, check=False
        )
    except OSError:
        return False
    return asked.returncode == 0


PACKAGES = ("pipeline", "actors")
"""Raylign's. A working directory that holds both is a checkout."""


def _hidden_packages(working_dir: Path) -> Iterator[str]:
    """Packages of the user's that the job would import in place of Raylign's."""
    if _is_checkout(working_dir):
        return
    for place in (working_dir / form for name in PACKAGES for form in (name, f"{name}.py")):
        if place.exists():
            yield (
                f"{place}: hides Raylign's package `{place.stem}` from the job, which runs in a copy of this "
                "directory; rename it, or submit from another directory"
            )


def _is_checkout(root: Path) -> bool:
    return all((root / name / "__init__.py").is_file() for name in PACKAGES)


def _embedded_base_stays(config: RunConfig, working_dir: Path) -> Iterator[str]:
    """A checkout's embedded base, where neither the working directory nor the package holds it."""
    import actors

    root = Path(str(actors.__file__)).resolve().parents[1]
    base = Path(config.model.base).resolve()
    if base == root / "assets" / "tiny-moe" and not base.is_relative_to(working_dir.resolve()):
        yield (
            f"model.base: the embedded base lies in {root}, which is not shipped; submit from there, or copy "
            "the base into a directory that every node sees"
        )


def _own_code(working_dir: Path) -> dict[str, Any]:
    """Ships this package where the working directory does not hold it."""
    import actors
    import pipeline

    if _is_checkout(working_dir):
        return {}
    return {"py_modules": [str(Path(str(package.__file__)).parent) for package in (pipeline, actors)]}
