"""The model card of a stage's artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.planning.nodes import Node


def write_stage_card(config: RunConfig, node: Node, directory: Path, metrics: dict[str, Any]) -> None:
    """README.md of a stage's artifact."""
    from actors.models.facts import HEAD_FILE
    from pipeline.artifacts.manifest import versions
    from pipeline.report import CardFacts, write_card

    names = ("learning_rate", "lr_scheduler_type", "batch_size", "max_length", "beta", "loss_type")
    settings = {name: getattr(node.spec, name) for name in names if hasattr(node.spec, name)}
    write_card(
        directory,
        CardFacts(
            name=f"{config.name}-{node.name}",
            stage_type=node.kind,
            base_model=config.model.base,
            is_adapter=config.model.lora is not None,
            is_reward_model=node.spec.makes == "reward_model",
            loads_elsewhere=not (directory / HEAD_FILE).is_file(),
            started_from="" if node.init == "base" else node.init,
            datasets=[source.source for source in node.spec.data],
            settings=settings | {"steps": node.prepared.total_steps, "seed": node.prepared.seed},
            lora=config.model.lora.model_dump() if config.model.lora else {},
            metrics=metrics,
            versions=versions(),
        ),
    )
