"""Verbs of runs that were submitted to a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from actors.errors import EXIT_DONE
from pipeline.api import check_stage
from pipeline.cli.shared import (
    Address,
    Config,
    DryRun,
    Fresh,
    Overrides,
    Run,
    Until,
    example,
    load,
)
from pipeline.monitoring import console
from pipeline.monitoring.printable import printable_stdout
from pipeline.monitoring.progress import working

verbs = typer.Typer()


@verbs.command(epilog=example("raylign submit my-run.yaml output_dir=/mnt/runs/a --address http://head:8265"))
def submit(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    dry_run: DryRun = False,
    until: Until = None,
    fresh: Fresh = False,
    follow: Annotated[bool, typer.Option(help="Follow the log and return the job's exit code.")] = True,
) -> int:
    """Ship the working directory to a running cluster and run there, as a Ray job."""
    loaded = load(config, overrides)
    check_stage(loaded, until)
    from pipeline.jobs import commands

    flags = [*(["--dry-run"] if dry_run else []), *(["--until", until] if until else [])]
    flags += ["--fresh"] if fresh else []
    with printable_stdout():
        return commands.submit(
            loaded, config, overrides or [], address=address, flags=flags, follow=follow, say=console.say
        )


@verbs.command(epilog=example("raylign status my-run"))
def status(
    name: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Name of a run or id of a job; none: all.")
    ] = None,
    address: Address = None,
) -> int:
    """Show submitted runs: state, times, exit code."""
    with working("asking the cluster"):
        from pipeline.jobs import commands

        jobs = commands.status(name, address=address)
    rows = commands.status_rows(jobs)
    if not rows:
        console.say("no runs on this cluster")
    console.table("Runs", ["run", "job", "state", "started", "took", "exit", "results in"], rows)
    for line in commands.failures(jobs):
        console.say(line)
    return EXIT_DONE


@verbs.command(epilog=example("raylign logs my-run --follow"))
def logs(
    name: Run,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the job ends; returns its exit code.")
    ] = False,
) -> int:
    """Print a submitted run's log."""
    from pipeline.jobs import commands

    with printable_stdout():
        return commands.logs(name, address=address, follow=follow, say=console.say)


@verbs.command(epilog=example("raylign stop my-run"))
def stop(
    name: Run,
    address: Address = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for the run to save.")] = 300,
    now: Annotated[bool, typer.Option("--now", help="End it at once, without saving.")] = False,
) -> int:
    """Let a submitted run save, then stop it."""
    from pipeline.jobs import commands

    return commands.stop(name, address=address, seconds=timeout, now=now, say=console.say)
