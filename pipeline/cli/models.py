"""Verbs for the models of a run: eval, chat, serve, merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actors.errors import EXIT_DONE, UserError
from pipeline.cli.shared import Overrides, example, load
from pipeline.monitoring import console
from pipeline.monitoring.progress import working

if TYPE_CHECKING:
    from actors.models.lora.merge import MergeReport
    from pipeline.config.run_config import RunConfig

verbs = typer.Typer()

ROUNDED_AWAY = 0.1
"""Share that a merge may lose before the user is told of float32: of the adapter's effect, or of the adapted
weights, which stay at their old value."""


@verbs.command(
    "eval",
    epilog=example(
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
        from pipeline.cli.pair_scoring import eval_pairs

        on_bad_row = "skip" if skip_bad_rows else "error"
        return eval_pairs(
            str(target), pairs, split=split, out=out, max_length=max_length, on_bad_row=on_bad_row
        )
    config = target
    chosen = [f"eval.models=[{models}]"] if models else []
    loaded = load(config, [*(overrides or []), *chosen])
    scores_pairs = any(stage.makes == "reward_model" and stage.eval_data for stage in loaded.stages.values())
    if loaded.eval is None and not scores_pairs:
        raise UserError(
            f"{config}: eval: missing; it names the held-out data (see `raylign init`). A reward stage is "
            "evaluated on its `eval_data`"
        )
    with working("loading what a run needs"):
        from pipeline.execution.run import evaluate_only

    return evaluate_only(loaded)


@verbs.command(epilog=example("raylign chat runs/demo/dpo/adapter", "raylign chat my-run.yaml --model sft"))
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
    target = result_of(load(Path(model), []), stage) if model.endswith((".yaml", ".yml")) else model
    from pipeline.cli.chat_loop import chat as run_chat

    return run_chat(
        target, prompt=prompt, system=system, temperature=temperature, max_tokens=max_tokens, seed=seed
    )


@verbs.command(
    epilog=example(
        "raylign serve runs/demo", "raylign serve runs/demo --model sft", "raylign serve ORG/MODEL"
    )
)
def serve(
    target: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="Model or adapter, or a run's directory or CONFIG.")
    ],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="Of a run: base or a stage; again for more. Default: all it has."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is one that is free.")] = 8000,
    public: Annotated[
        bool, typer.Option("--public", help="Allow an address that other machines can reach.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: the run's, else float32.")
    ] = None,
) -> int:
    """Serve a model, or those of a run under their stages' names, by vLLM's OpenAI-compatible server."""
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"--dtype: '{dtype}' is not one of float32, bfloat16")
    from pipeline.cli.serving import serve as serve_models

    return serve_models(target, models or [], host, port, public, dtype)


@verbs.command(epilog=example("raylign merge runs/demo/dpo/adapter merged-model --dtype bfloat16"))
def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory of the adapter.")],
    out: Annotated[Path, typer.Argument(help="Directory for the merged model: new, or empty.")],
    base: Annotated[str | None, typer.Option(help="Base to merge into; default: the adapter's own.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the base's.")] = None,
) -> int:
    """Merge an adapter into its base: a full Hugging Face model, checked against the unmerged logits."""
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"--dtype: '{dtype}' is not one of float32, bfloat16")
    with working(f"merging {adapter} into its base, and comparing both"):
        from actors.models.lora.merge import merge_adapter

        done = merge_adapter(base, adapter, out, dtype)
    console.say(
        f"wrote {done.out_dir} in {done.dtype}: {done.merged_weights} tensors changed, {done.seconds:.1f} s"
    )
    for line in differences(done):
        console.say(line)
    return EXIT_DONE


def differences(done: MergeReport) -> list[str]:
    """Cost of rounding to the merged model's dtype, and what to do about it, in lines."""
    lines = [
        f"log-probabilities differ from the unmerged model's by {done.mean_logprob_diff:.1e} on average "
        f"(median {done.median_logprob_diff:.1e}, {done.max_logprob_diff:.1e} at most)"
    ]
    would = f" (in bfloat16: {done.unchanged_share_bf16:.1%})" if done.dtype != "bfloat16" else ""
    lines.append(f"adapted weights that rounding left at their old value: {done.unchanged_share:.1%}{would}")
    if done.dtype == "float32" or not done.adapter_effect or done.mean_logprob_diff is None:
        return lines
    lost = done.mean_logprob_diff / done.adapter_effect
    lines.append(
        f"the adapter itself moves them by {done.adapter_effect:.1e} on average: rounding to {done.dtype} "
        f"changes {lost:.0%} as much"
    )
    if lost > ROUNDED_AWAY:
        lines.append(
            "that is much: `--dtype float32` keeps it, or serve the adapter unmerged on its base; where it "
            f"has to be {done.dtype}, evaluate the merged model before it is used"
        )
    elif done.unchanged_share > ROUNDED_AWAY:
        lines.append(
            f"little is lost, though many single changes are too small for {done.dtype}; "
            "`--dtype float32` keeps them"
        )
    else:
        lines.append("little is lost: the merged model can be used as it is")
    return lines


def result_of(config: RunConfig, stage: str | None) -> str:
    """Weights of `base` or of a finished stage, on disk."""
    stage = stage or list(config.stages)[-1]
    if stage == "base":
        return config.model.base
    if stage not in config.stages:
        raise UserError(f"--model: no stage is named '{stage}'; possible: base, {', '.join(config.stages)}")
    for name in ("adapter", "model"):
        if (config.output_dir / stage / name).is_dir():
            return str(config.output_dir / stage / name)
    raise UserError(f"--model: {config.output_dir / stage} holds no result yet; run the config first")
