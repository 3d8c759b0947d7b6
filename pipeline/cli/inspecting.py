"""Runs `raylign inspect` on one source, or on the data of a config's stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from actors.errors import EXIT_DONE, UserError
from pipeline.monitoring.console import out

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig


def inspect_source(
    data: str, *, split: str, name: str | None, base: str, rows: int, max_length: int | None
) -> int:
    """Show one source with the tokenizer of `base`.

    Raises:
        UserError: the source or the base can't be read.
    """
    from pydantic import ValidationError

    from actors.models.base.loading import load_tokenizer
    from actors.models.spec import ModelSpec
    from actors.models.turn_ends import vocab_size
    from pipeline.data.inspect import inspect
    from pipeline.data.spec import DataSpec

    try:
        spec = DataSpec(source=data, split=split, name=name)
    except ValidationError as error:
        raise UserError(
            [str(e["ctx"]["error"]) if "ctx" in e else e["msg"] for e in error.errors()]
        ) from None
    model = ModelSpec(base=base)
    inspect(
        [spec],
        load_tokenizer(model),
        rows=rows,
        max_length=max_length,
        vocab_size=vocab_size(model.base),
        console=out,
    )
    return EXIT_DONE


def inspect_stages(config: RunConfig, stage: str | None, rows: int) -> int:
    """Show the data of one stage of a config, or of all of them, as the stage itself reads it.

    Raises:
        UserError: no such stage, or data or base that can't be read.
    """
    from actors.models.base.loading import load_tokenizer
    from actors.models.turn_ends import vocab_size
    from pipeline.data.inspect import inspect
    from pipeline.data.tokens.template_date import keep_date

    if stage is not None and stage not in config.stages:
        raise UserError(f"--stage {stage}: no such stage; the config has {', '.join(config.stages)}")
    tokenizer = load_tokenizer(config.model)
    keep_date(tokenizer, Path(config.output_dir), write=False)
    for name in [stage] if stage else config.stages:
        spec = config.stages[name]
        for field in ("data", "eval_data"):
            sources = getattr(spec, field)
            if not sources:
                continue
            out.print(f"[bold]{name}.{field}[/]")
            inspect(
                sources,
                tokenizer,
                kind=spec.records,
                rows=rows if field == "data" else 0,
                max_length=spec.max_length,
                truncation=spec.truncation_mode,
                train_on=spec.tokens_trained,
                seed=config.seed_of(name),
                vocab_size=vocab_size(config.model.base),
                console=out,
            )
    return EXIT_DONE
