"""Runs `raylign inspect` on one source, or on the data of a config's stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from actors.errors import EXIT_DONE, EXIT_FAILED, UserError
from pipeline.monitoring import console
from pipeline.monitoring.progress import working

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig


def inspect_source(
    data: str, *, split: str, name: str | None, base: str, rows: int, max_length: int | None
) -> int:
    """Show one source with the tokenizer of `base`; exit code 1 where it has rows at which a run would stop.

    Raises:
        UserError: the source or the base can't be read.
    """
    with working(f"reading {base}"):
        from pydantic import ValidationError

        from actors.models.base.loading import load_tokenizer
        from actors.models.spec import ModelSpec
        from actors.models.turn_ends import vocab_size
        from pipeline.data.inspect import inspect
        from pipeline.data.spec import DataSpec

        model = ModelSpec(base=base)
        tokenizer, known = load_tokenizer(model), vocab_size(model.base)
    try:
        spec = DataSpec(source=data, split=split, name=name)
    except ValidationError as error:
        raise UserError(
            [str(e["ctx"]["error"]) if "ctx" in e else e["msg"] for e in error.errors()]
        ) from None
    stops = inspect(
        [spec],
        tokenizer,
        rows=rows,
        max_length=max_length,
        vocab_size=known,
        console=console.out,
        reading=working(f"reading {data}"),
    )
    return EXIT_FAILED if stops else EXIT_DONE


def inspect_stages(config: RunConfig, stage: str | None, rows: int) -> int:
    """Show the data of one stage of a config, or of all of them, as the stage itself reads it; exit code 1
    where there are rows at which the run would stop.

    Raises:
        UserError: no such stage, or data or base that can't be read.
    """
    if stage is not None and stage not in config.stages:
        raise UserError(f"--stage {stage}: no such stage; the config has {', '.join(config.stages)}")
    with working(f"reading {config.model.base}"):
        from actors.models.base.loading import load_tokenizer
        from actors.models.turn_ends import vocab_size
        from pipeline.data.inspect import inspect
        from pipeline.data.tokens.template_date import keep_date

        tokenizer, known = load_tokenizer(config.model), vocab_size(config.model.base)
    stops = 0
    keep_date(tokenizer, Path(config.output_dir), write=False)
    for name in [stage] if stage else config.stages:
        spec = config.stages[name]
        for field in ("data", "eval_data"):
            sources = getattr(spec, field)
            if not sources:
                continue
            console.out.print(f"[bold]{name}.{field}[/]")
            stops += inspect(
                sources,
                tokenizer,
                kind=spec.records,
                rows=rows if field == "data" else 0,
                max_length=spec.max_length,
                truncation=spec.truncation_mode,
                train_on=spec.tokens_trained,
                seed=config.seed_of(name),
                vocab_size=known,
                console=console.out,
                reading=working(f"reading {name}.{field}"),
            )
    return EXIT_FAILED if stops else EXIT_DONE
