"""`raylign`: one function per verb. Heavy imports happen inside them, so that --help is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actors.errors import EXIT_DONE, EXIT_USER, RunFailure, UserError
from pipeline import console

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig

app = typer.Typer(
    name="raylign",
    help="SFT, reward models, DPO and online RL of mixture-of-experts models, with LoRA, in Ray actors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


def _example(*lines: str) -> str:
    return "Example:\n\n" + "\n\n".join(lines)


def _load(path: Path, overrides: list[str] | None) -> RunConfig:
    from pipeline.config.load import load_config

    try:
        return load_config(path, overrides or [])
    except UserError as error:
        raise typer.Exit(console.user_error(error, str(path))) from None


@app.command(
    epilog=_example(
        "raylign init my-run.yaml --base assets/tiny-moe",
        "raylign init online.yaml --stages sft,reward,dpo,ppo",
    )
)
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("run.yaml"),
    base: Annotated[str, typer.Option(help="Hub id or directory of the base model.")] = "assets/tiny-moe",
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the file's.")] = None,
    stages: Annotated[
        str, typer.Option(metavar="TYPE,...", help="Stages in order: sft, reward, dpo, ppo, grpo, rloo.")
    ] = "sft,dpo",
    schema: Annotated[
        bool, typer.Option("--schema", help="Write the JSON schema for editors instead.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> int:
    """Write a starter config: every field with its meaning and default."""
    import json

    from pipeline.config.json_schema import json_schema
    from pipeline.config.starter import starter

    if path.exists() and not force:
        raise UserError(f"{path}: exists already; name another file, or add --force")
    kinds = [kind.strip() for kind in stages.split(",") if kind.strip()]
    text = json.dumps(json_schema(), indent=1) + "\n" if schema else starter(name or path.stem, base, kinds)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    console.say(f"wrote {path}" if schema else f"wrote {path}; next: raylign validate {path}")
    return EXIT_DONE


@app.command(epilog=_example("raylign validate my-run.yaml stages.dpo.beta=0.2"))
def validate(config: Config, overrides: Overrides = None) -> int:
    """List everything that is wrong with a run, and what it will need. Starts nothing."""
    loaded = _load(config, overrides)
    from pipeline.plan import cluster_plan
    from pipeline.validate import find

    findings = find(loaded)
    if findings.base is not None and findings.base.config is not None:
        console.say(f"base {loaded.model.base}: {findings.base.config.model_type}")
    for line in findings.architecture:
        console.say(line)
    if findings.targets is not None:
        console.say(f"LoRA targets\n{findings.targets}")
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
    if findings.problems:
        return console.user_error(UserError(findings.problems), str(config))
    console.say(cluster_plan(loaded))
    for stage, size in findings.sync_bytes.items():
        console.say(f"  {stage}: a sync sends {size:,} bytes to each engine ({loaded.roles.rollout.workers})")
    console.say(f"{config}: fine")
    return EXIT_DONE


@app.command(epilog=_example("raylign run configs/demo.yaml", "raylign run my-run.yaml --dry-run"))
def run(
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    until: Until = None,
    fresh: Fresh = False,
) -> int:
    """Run the stages; the same command goes on after an interruption."""
    loaded = _load(config, overrides)
    _check_until(loaded, until)
    from pipeline.run import run as run_config

    return run_config(loaded, dry_run=dry_run, until=until, fresh=fresh)


@app.command(epilog=_example("raylign submit my-run.yaml output_dir=/mnt/runs/a --address http://head:8265"))
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
    loaded = _load(config, overrides)
    _check_until(loaded, until)
    from pipeline import jobs

    flags = [*(["--dry-run"] if dry_run else []), *(["--until", until] if until else [])]
    flags += ["--fresh"] if fresh else []
    return jobs.submit(
        loaded, config, overrides or [], address=address, flags=flags, follow=follow, say=console.say
    )


@app.command(epilog=_example("raylign status my-run"))
def status(
    name: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Name of a run or id of a job; none: all.")
    ] = None,
    address: Address = None,
) -> int:
    """Show submitted runs: state, times, exit code."""
    from pipeline import jobs

    rows = jobs.status_rows(jobs.status(name, address=address))
    if not rows:
        console.say("no runs on this cluster")
    console.table("Runs", ["run", "job", "state", "started", "took", "exit", "results in"], rows)
    return EXIT_DONE


@app.command(epilog=_example("raylign logs my-run --follow"))
def logs(
    name: Run,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the job ends; returns its exit code.")
    ] = False,
) -> int:
    """Print a submitted run's log."""
    from pipeline import jobs

    return jobs.logs(name, address=address, follow=follow, say=console.say)


@app.command(epilog=_example("raylign stop my-run"))
def stop(
    name: Run,
    address: Address = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for the run to save.")] = 300,
    now: Annotated[bool, typer.Option("--now", help="End it at once, without saving.")] = False,
) -> int:
    """Let a submitted run save, then stop it."""
    from pipeline import jobs

    return jobs.stop(name, address=address, seconds=timeout, now=now, say=console.say)


@app.command(
    epilog=_example(
        "raylign inspect builtin:arithmetic --split preference --base assets/tiny-moe",
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
    ] = "assets/tiny-moe",
    rows: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest sequence in tokens.")] = 1024,
) -> int:
    """Show rows as understood, their tokens with the loss mask, counts and lengths."""
    if data.endswith((".yaml", ".yml")):
        from pipeline.inspecting import inspect_stages

        return inspect_stages(_load(Path(data), []), stage, rows)
    from pipeline.inspecting import inspect_source

    return inspect_source(data, split=split, name=subset, base=base, rows=rows, max_length=max_length)


@app.command(
    "eval",
    epilog=_example(
        "raylign eval configs/demo.yaml --models base,dpo",
        "raylign eval runs/demo/reward/adapter --pairs builtin:arithmetic --split test_preference",
    ),
)
def evaluate(
    target: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="The run's YAML file, or with --pairs a reward model.")
    ],
    overrides: Overrides = None,
    models: Annotated[
        str | None, typer.Option(help="base and stages, with commas; default: the config's.")
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Pairs for a reward model: hub id, file, directory, builtin:NAME."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the pairs, with slices: test[:100].")] = "train",
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest sequence of a pair in tokens; the rest is cut off.")
    ] = 1024,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out pairs that can't be used, counted.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where the scores of the pairs go.")] = Path("pair_scores.jsonl"),
) -> int:
    """Evaluate the models of a run on its held-out prompts, in vLLM; its reward models on held-out pairs.

    With --pairs: score pairs of your own with one reward model.
    """
    if pairs is not None:
        from pipeline.pair_scoring import eval_pairs

        on_bad_row = "skip" if skip_bad_rows else "error"
        return eval_pairs(
            str(target), pairs, split=split, out=out, max_length=max_length, on_bad_row=on_bad_row
        )
    config = target
    chosen = [f"eval.models=[{models}]"] if models else []
    loaded = _load(config, [*(overrides or []), *chosen])
    scores_pairs = any(stage.type == "reward" and stage.eval_data for stage in loaded.stages.values())
    if loaded.eval is None and not scores_pairs:
        raise UserError(
            f"{config}: eval: missing; it names the held-out data (see `raylign init`). A reward stage is "
            "evaluated on its `eval_data`"
        )
    from pipeline.run import evaluate_only

    return evaluate_only(loaded)


@app.command(epilog=_example("raylign chat runs/demo/dpo/adapter", "raylign chat my-run.yaml --model sft"))
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model or adapter (directory or hub id), or a CONFIG.")
    ],
    stage: Annotated[
        str | None, typer.Option("--model", help="With a CONFIG: base or a stage; default: the last.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens per answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
) -> int:
    """Talk to a model in vLLM."""
    target = result_of(_load(Path(model), []), stage) if model.endswith((".yaml", ".yml")) else model
    from pipeline.chatting import chat as run_chat

    return run_chat(
        target, prompt=prompt, system=system, temperature=temperature, max_tokens=max_tokens, seed=seed
    )


@app.command(epilog=_example("raylign merge runs/demo/dpo/adapter merged-model --dtype bfloat16"))
def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory of the adapter.")],
    out: Annotated[Path, typer.Argument(help="Directory for the merged model; must not exist.")],
    base: Annotated[str | None, typer.Option(help="Base to merge into; default: the adapter's own.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the base's.")] = None,
) -> int:
    """Merge an adapter into its base: a full Hugging Face model, checked against the unmerged logits."""
    if out.exists():
        raise UserError(f"{out}: exists already; name a new directory")
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"--dtype: '{dtype}' is not one of float32, bfloat16")
    from actors.models.merge import merge_adapter

    done = merge_adapter(base, adapter, out, dtype)
    console.say(
        f"wrote {done.out_dir} in {done.dtype}: {done.merged_weights} tensors changed, {done.seconds:.1f} s"
    )
    console.say(
        f"largest difference of a log-probability from the unmerged model: {done.max_logprob_diff:.1e}"
    )
    console.say(
        f"adapted weights that rounding left at their old value: {done.unchanged_share:.1%} in {done.dtype}, "
        f"{done.unchanged_share_bf16:.1%} in bfloat16"
    )
    return EXIT_DONE


@app.command(epilog=_example("raylign report runs/demo"))
def report(directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run's directory.")]) -> int:
    """Write report.html and its plots from what a run directory holds."""
    if not (directory / "run.json").is_file():
        raise UserError(f"{directory}: no run.json there, so it is not a run directory (usually runs/NAME)")
    from pipeline.report import build_report

    console.say(f"wrote {build_report(directory)}")
    return EXIT_DONE


@app.command(epilog=_example("raylign env"))
def env() -> int:
    """Versions, cores, memory, GPUs, Ray, and where things are."""
    from pipeline.env import describe_environment

    console.table("Environment", ["", ""], describe_environment())
    return EXIT_DONE


def _check_until(config: RunConfig, until: str | None) -> None:
    if until is not None and until not in config.stages:
        from pipeline.config.messages import did_you_mean

        names = ", ".join(config.stages)
        raise UserError(
            f"--until: no stage is named '{until}'; stages: {names}{did_you_mean(until, config.stages)}"
        )


def result_of(config: RunConfig, stage: str | None) -> str:
    """Where the weights of `base` or of a finished stage are."""
    stage = stage or list(config.stages)[-1]
    if stage == "base":
        return config.model.base
    if stage not in config.stages:
        raise UserError(f"--model: no stage is named '{stage}'; possible: base, {', '.join(config.stages)}")
    for name in ("adapter", "model"):
        if (config.output_dir / stage / name).is_dir():
            return str(config.output_dir / stage / name)
    raise UserError(f"--model: {config.output_dir / stage} holds no result yet; run the config first")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failure, 2 the user's mistake, 75 stopped."""
    for name in ("RAY_USAGE_STATS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS"):
        os.environ.setdefault(name, "0" if name == "RAY_USAGE_STATS_ENABLED" else "1")
    try:
        result: Any = app(args=arguments, prog_name="raylign", standalone_mode=False)
        return int(result or EXIT_DONE)
    except UserError as error:
        return console.user_error(error)
    except RunFailure as error:
        return console.run_failure(error)
    except (KeyboardInterrupt, typer.Abort):
        console.err.print("interrupted")
        return 130
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "show"):
            error.show()
            return EXIT_USER
        raise


if __name__ == "__main__":
    sys.exit(main())
