"""Scores pairs with a reward model, in this process (`raylign eval REWARD_MODEL --pairs DATA`)."""

from __future__ import annotations

from pathlib import Path

from actors.errors import EXIT_DONE, UserError
from pipeline.monitoring import console
from pipeline.monitoring.progress import working


def eval_pairs(
    model: str, source: str, *, split: str, out: Path, max_length: int | None, on_bad_row: str
) -> int:
    """Print the share of pairs whose chosen answer scores higher, and write every score to `out`.

    Raises:
        UserError: the directory holds no reward model, or the pairs can't be used.
    """
    from actors.models.base.loading import is_adapter_dir, load_tokenizer
    from actors.models.facts import saved_head
    from actors.models.lora.adapters import base_quantization
    from actors.models.spec import ModelSpec
    from actors.models.turn_ends import vocab_size
    from actors.trainer.model_host import START_ADAPTER, ModelHost
    from actors.trainer.spec import HostSpec
    from pipeline.data.reading.records import load_records
    from pipeline.data.spec import DataSpec
    from pipeline.data.tokens.tokenize import tokenize
    from pipeline.evaluation.pairs import pair_figures, score_pairs, write_scores

    if not is_adapter_dir(model):
        raise UserError(
            f"{model}: no reward model there (adapter_config.json is missing); name the `adapter` directory "
            "of a finished reward stage, such as runs/demo/reward/adapter"
        )
    if saved_head(model) is None:
        raise UserError(f"{model}: this adapter has no score head, so it is a policy and no reward model")
    with working(f"scoring the pairs of {source}"):
        trained_on = base_quantization(model)
        kind = None if trained_on is None else trained_on[0]
        spec = ModelSpec(base=model, quantization=kind, allow_untested=True)
        tokenizer = load_tokenizer(spec)
        data = DataSpec.model_validate({"source": source, "split": split, "on_bad_row": on_bad_row})
        pairs = tokenize(
            load_records([data], "preference", seed=0),
            tokenizer,
            max_length=max_length,
            scored=True,
            vocab_size=vocab_size(model),
        )
        host = ModelHost(HostSpec(model=spec))
        scores = score_pairs(lambda batch: host.scores.scores(batch, START_ADAPTER), pairs)
    write_scores(out, pairs, scores, tokenizer)
    figures = pair_figures(scores)
    low, high = figures["ci95"]
    if pairs.skipped.counts:
        console.say(f"left out {pairs.skipped.summary()}")
    if pairs.stats.truncated:
        console.say(f"{pairs.stats.truncated:,} sequences cut at {max_length} tokens")
    console.say(
        f"the chosen answer scores higher in {figures['accuracy']:.1%} of {figures['n']:,} pairs "
        f"(95 % interval {low:.1%} - {high:.1%}), by {figures['margin']:.3f} on average"
    )
    console.say(f"wrote {out}")
    return EXIT_DONE
