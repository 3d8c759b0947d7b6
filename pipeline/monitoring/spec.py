"""Settings of metrics and trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actors.spec import Spec


class LoggingSpec(Spec):
    """Interval of metrics, and trackers that get them."""

    logging_steps: int = Field(default=1, ge=1)
    """A line of metrics every so many steps, as `max_steps` counts them."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list)
    """Trackers that get the same metrics; each needs its own package."""
