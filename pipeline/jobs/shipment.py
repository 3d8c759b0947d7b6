"""The job that `raylign submit` sends to a cluster: command, environment, package. Needs no cluster."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.cluster import SHIPPED, passed_on
from actors.errors import UserError
from actors.models.spec import locate_embedded_base
from pipeline.artifacts.hiding import hiding_problems
from pipeline.jobs.handover import told_secrets
from pipeline.jobs.inputs import CONFIG, Input, named_inputs, unshipped
from pipeline.jobs.package import Package, collect

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig

NAME_KEY, OUTPUT_KEY = "raylign_run", "raylign_output_dir"
"""Keys of the job's metadata, by which `status`, `logs` and `stop` find a run by its name."""


@dataclass(frozen=True)
class Shipment:
    """Everything that a job needs."""

    arguments: list[str]
    package: Package
    metadata: dict[str, str]
    values: dict[str, str]
    """Variables that go with the job, apart from all else."""

    def entrypoint(self, python: str = "python") -> str:
        """The shell command of the job. Ray starts it at the package's top, which is on Python's path.

        With -P nothing else is: neither the directory that it works in nor that of a script. Where there is
        no such `python`, as at the far end of a tunnel, which looks like this machine, Ray's is taken.
        """
        chosen = f'p={shlex.quote(python)}; command -v "$p" > /dev/null || p=python'
        return f'cd {SHIPPED} && {chosen}; exec "$p" {shlex.join(["-P", "-m", "pipeline", *self.arguments])}'

    def runtime_env(self, archive: Path, variables: Mapping[str, str]) -> dict[str, Any]:
        """Ray's, with the package written at `archive` and variables that everybody may see."""
        seen = {"PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", **variables}
        return {"working_dir": str(archive), "env_vars": seen}


def plan_shipment(
    config: RunConfig,
    config_path: Path,
    overrides: Sequence[str],
    flags: Sequence[str],
    working_dir: Path,
) -> Shipment:
    """The job that runs `config` from a copy of `working_dir`.

    Raises:
        UserError: with everything that a job would not find where it looks for it, a relative output
            directory, which would be lost with Ray's temporary copy, and more to ship than Ray takes.
    """
    embedded = _embedded_base(config)
    package = collect(working_dir, [embedded] if embedded is not None else [])
    problems = [*_output_problems(config), *hiding_problems(config.functions(), working_dir)]
    inputs = [Input(CONFIG, config_path)]
    inputs += named_inputs(config, working_dir, problems)
    problems += [
        problem
        for found in inputs
        if embedded is None or found.path.resolve() != embedded
        if (problem := unshipped(found, package.lacks, working_dir)) is not None
    ]
    problems += [*package.problems(), *told_secrets(overrides, config.ray.env)]
    values = {}
    try:
        values = passed_on(config.ray.env)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    inside = config_path.resolve().relative_to(working_dir.resolve())
    return Shipment(
        ["run", str(inside), *overrides, "ray.address=auto", *flags],
        package,
        {NAME_KEY: config.name, OUTPUT_KEY: str(config.output_dir)},
        values,
    )


def _embedded_base(config: RunConfig) -> Path | None:
    """The directory of Raylign's own base, where the run takes it and it lies beside the packages, as in a
    checkout; in an installed one it lies in them."""
    try:
        embedded = Path(locate_embedded_base()).resolve()
    except ValueError:
        return None
    beside = Path(__file__).resolve().parents[2] / "assets"
    return embedded if Path(config.model.base).resolve() == embedded and embedded.parent == beside else None


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
