"""Verbs of a run, from its first config to its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.errors import EXIT_DONE, EXIT_STOPPED, UserError
from pipeline.api import check_stage
from pipeline.cli.shared import Config, DryRun, Fresh, Overrides, Until, example, load
from pipeline.monitoring import console
from pipeline.monitoring.progress import working

verbs = typer.Typer()

STAGES = "sft, reward, dpo, kto, ppo, grpo, rloo, reinforce_pp, online_dpo, distill"
"""Types of stages, which --help tells without loading their specs."""


@verbs.command(
    epilog=example(
        "raylign init my-run.yaml --base ORG/NAME",
        "raylign init online.yaml --stages sft,reward,dpo,ppo",
    )
)
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("run.yaml"),
    base: Annotated[str, typer.Option(help="Hub id or directory of the base model.")] = "builtin:tiny-moe",
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the file's.")] = None,
    stages: Annotated[str, typer.Option(metavar="TYPE,...", help=f"Stages in order: {STAGES}.")] = "sft,dpo",
    schema: Annotated[
        bool, typer.Option("--schema", help="Write the JSON schema for editors instead.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> int:
    """Write a starter config: every field with its meaning and default."""
    import json

    from actors.cluster import local_resources
    from pipeline.config.init_template import starter
    from pipeline.config.json_schema import json_schema

    if path.exists() and not force:
        raise UserError(f"{path}: exists already; name another file, or add --force")
    kinds = [kind.strip() for kind in stages.split(",") if kind.strip()]
    gpus = local_resources()["GPU"]
    text = (
        starter(name or path.stem, base, kinds, gpus) if not schema else json.dumps(json_schema(), indent=1)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    console.say(f"wrote {path}" if schema else f"wrote {path}; next: raylign validate {path}")
    return EXIT_DONE


@verbs.command(epilog=example("raylign validate my-run.yaml stages.dpo.beta=0.2"))
def validate(config: Config, overrides: Overrides = None) -> int:
    """List everything that is wrong with a run, and what it will need. Starts nothing."""
    loaded = load(config, overrides)
    with working("checking data and base"):
        from pipeline.planning.resources import cluster_plan
        from pipeline.planning.validate import find

        findings = find(loaded)
    if findings.base is not None and findings.base.config is not None:
        console.say(f"base {loaded.model.base}: {findings.base.config.model_type}")
    for line in findings.architecture:
        console.say(line)
    for line in findings.template:
        console.say(line)
    if findings.targets is not None:
        console.say(f"LoRA targets\n{findings.targets}")
    for line in findings.sources:
        console.say(line)
    columns = [
        "stage",
        "starts from",
        "reference",
        "rows",
        "tokens (median / longest)",
        "steps x rows or samples",
    ]
    console.table("Stages", columns, findings.stages)
    if findings.prompts is not None:
        console.say(f"evaluation of {', '.join(loaded.eval_models())} on {findings.prompts} prompts")
    for line in findings.remarks:
        console.say(line)
    if findings.problems:
        return console.user_error(UserError(findings.problems), str(config))
    console.say(cluster_plan(loaded))
    for stage, size in findings.sync_bytes.items():
        console.say(f"  {stage}: a sync sends {size:,} bytes to each engine ({loaded.roles.rollout.workers})")
    if findings.memory:
        console.say(f"  {findings.memory}; raylign plan says more")
    console.say(f"{config}: fine")
    return EXIT_DONE


@verbs.command(
    epilog=example(
        "raylign plan configs/grpo-qwen3-30b-a3b.yaml --gpu h200",
        "raylign plan my-run.yaml model.gradient_checkpointing=true --gpu cpu",
    )
)
def plan(
    config: Config,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="h100-80, h200, a100-80, l40s, or cpu: this machine, measured for a second or two. Default: "
            "h100-80 where roles have GPUs, else this machine.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all numbers, in bytes and seconds.")] = False,
) -> int:
    """Say what a run will take of memory, time and disk, by its base's config.json. Starts nothing."""
    from pipeline.cli.planning import show_plan

    return show_plan(load(config, overrides), gpu, as_json=json)


@verbs.command(epilog=example("raylign run configs/demo.yaml", "raylign run my-run.yaml --dry-run"))
def run(
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    until: Until = None,
    fresh: Fresh = False,
) -> int:
    """Run the stages; the same command goes on after an interruption."""
    from pipeline.execution.stop import StopRequests
    from pipeline.jobs.handover import take_values

    with StopRequests(console.say, to_the_end=True) as stop:
        try:
            take_values()
            loaded = load(config, overrides)
            check_stage(loaded, until)
            with working("loading what a run needs"):
                from pipeline.execution.run import run as run_config
            return run_config(loaded, dry_run=dry_run, until=until, fresh=fresh, stop=stop)
        except KeyboardInterrupt:
            if not stop.cut:
                raise
            return EXIT_STOPPED


@verbs.command(epilog=example("raylign scale runs/my-run rollout=3"))
def scale(
    directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run that works.")],
    settings: Annotated[
        list[str], typer.Argument(metavar="rollout=N", help="Engines that it shall have from now on.")
    ],
    wait: Annotated[
        bool, typer.Option(help="Until it is done, or refused; the run goes on meanwhile.")
    ] = True,
) -> int:
    """Add engines to an online stage, or take some from it, while it goes on; its samples stay the same."""
    from pipeline.cli.scaling import scale_run

    return scale_run(directory, settings, wait=wait)


@verbs.command(
    epilog=example(
        "raylign inspect builtin:arithmetic --split preference",
        "raylign inspect my-run.yaml --stage dpo",
    )
)
def inspect(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Hub id, file, directory, builtin:NAME, or a CONFIG.")
    ],
    stage: Annotated[
        str | None, typer.Option(help="With a CONFIG: whose data; default: every stage's.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split, with slices: train[:100].")] = "train",
    subset: Annotated[str | None, typer.Option("--name", help="Configuration of a hub data set.")] = None,
    base: Annotated[
        str, typer.Option(help="Model whose tokenizer and chat template are used.")
    ] = "builtin:tiny-moe",
    rows: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest sequence in tokens.")] = 1024,
) -> int:
    """Show rows as understood, their tokens with the loss mask, counts and lengths."""
    if data.endswith((".yaml", ".yml")):
        from pipeline.cli.inspecting import inspect_stages

        return inspect_stages(load(Path(data), []), stage, rows)
    from pipeline.cli.inspecting import inspect_source

    return inspect_source(data, split=split, name=subset, base=base, rows=rows, max_length=max_length)


@verbs.command(epilog=example("raylign report runs/demo"))
def report(directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run's directory.")]) -> int:
    """Write report.html and its plots from what a run directory holds."""
    try:
        with working(f"reading {directory}, and drawing"):
            from pipeline.artifacts.run_directory import RunDirectory
            from pipeline.report import build_report

            written = build_report(directory, works=RunDirectory.in_use(directory))
    except OSError as error:
        where = error.filename or directory
        raise UserError(
            f"{where}: the report can't be written ({error.strerror or error}). It goes into the run's own "
            f"directory: make that writable, or copy it and name the copy (`raylign report COPY`)"
        ) from None
    console.say(f"wrote {written}")
    return EXIT_DONE


@verbs.command(
    epilog=example("raylign compare runs/a runs/b", "raylign compare runs/a runs/b runs/c --out abc.html")
)
def compare(
    directories: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR RUN_DIR...", help="Two runs or more.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
) -> int:
    """Lay runs over each other: settings that differ, curves, last figures."""
    from pipeline.cli.comparing import compare_runs

    return compare_runs(directories, out)


@verbs.command(epilog=example("raylign env"))
def env() -> int:
    """Versions, cores, memory, GPUs, Ray, and where things are."""
    with working("asking torch and the hub"):
        from pipeline.cli.environment import describe_environment

        found = describe_environment()
    console.table("Environment", ["", ""], found)
    return EXIT_DONE
