"""Arguments that several verbs take, and their checks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actors.errors import UserError
from pipeline.monitoring import console
from pipeline.monitoring.progress import working

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings over the file's: stages.dpo.beta=0.2"),
]
Address = Annotated[
    str | None,
    typer.Option(help="The cluster's dashboard (http://HEAD:8265) or address; default: RAY_ADDRESS."),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run, or id of its job.")]
Until = Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="All stages on a tiny twin of the base, a few rows, on CPU.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget what the run directory holds and start anew.")]


def example(*lines: str) -> str:
    """The end of a verb's help."""
    return "Example:\n\n" + "\n\n".join(lines)


def load(path: Path, overrides: list[str] | None) -> RunConfig:
    """The run that a file and settings over it describe; a mistake ends the command with code 2.

    Values under the names of an earlier version are said, a line each.
    """
    with warnings.catch_warnings(record=True) as caught:
        try:
            with working(f"reading {path}"):
                from actors.spec import OldValue
                from pipeline.config.load import load_config

                warnings.simplefilter("always", OldValue)
                config = load_config(path, overrides or [])
        except UserError as error:
            raise typer.Exit(console.user_error(error, str(path))) from None
    for warning in caught:
        if issubclass(warning.category, OldValue):
            console.say(f"warning: {path}: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return config
