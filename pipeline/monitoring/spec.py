"""Settings of what a run logs, and where to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actors.spec import Spec


class LoggingSpec(Spec):
    """What is recorded while a stage trains."""

    logging_steps: int = Field(default=1, ge=1)
    """A line of metrics every so many steps, as `max_steps` counts them."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list)
    """Trackers that get the same metrics; each needs its own package."""
