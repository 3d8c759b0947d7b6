"""What one stage trains: parameters, optimizer, schedule, and the checks around each step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from actors import checkpoint
from actors.errors import InvariantViolation
from actors.optim import FlatParameters, GradientCheck, make_optimizer, make_scheduler
from actors.optim_spec import OptimSpec


class Training:
    """From `prepare_training` to the next stage. `step` wants gradients already summed over ranks."""

    def __init__(
        self,
        role: str | None,
        parameters: Mapping[str, nn.Parameter],
        spec: OptimSpec,
        total_steps: int,
        without_decay: Collection[str] = (),
    ) -> None:
        self.role, self.spec, self.total_steps = role, spec, total_steps
        self.flat = FlatParameters(parameters, without_decay)
        self.optimizer = make_optimizer(self.flat, spec)
        self.scheduler = make_scheduler(self.optimizer, spec, total_steps)
        self.check = GradientCheck(parameters)
        self.steps_done = 0
        self.num_tokens = 0

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.flat.parameters.values())

    def step(
        self, step: int, loss: float, n_tokens: int, gradient_may_vanish: bool = False
    ) -> dict[str, float]:
        """Check, clip and apply the gradients.

        Args:
            step: number of this step, from 0.
            loss: its value over the global batch.
            n_tokens: in the global batch.
            gradient_may_vanish: no gradient anywhere is no fault; parameters are then looked at in a
                later step.

        Returns:
            `grad_norm` (before clipping), `learning_rate` (of this step), `num_tokens` (so far).

        Raises:
            InvariantViolation: loss or gradient is not finite, or a parameter that should have a
                gradient has none. The weights are then those of the step before.
        """
        norm = self.flat.grad_norm()
        metrics = {"grad_norm": float(norm), "learning_rate": float(self.scheduler.get_last_lr()[0])}
        self._check_finite(step, {"loss": loss, "grad_norm": metrics["grad_norm"]})
        if metrics["grad_norm"] > 0 or not gradient_may_vanish:
            self._check_gradients(step)
        if self.spec.max_grad_norm > 0:
            members = [bucket.flat for bucket in self.flat.buckets]
            torch.nn.utils.clip_grads_with_norm_(members, self.spec.max_grad_norm, norm)
        self.optimizer.step()
        self.scheduler.step()
        self.steps_done = step + 1
        self.num_tokens += n_tokens
        return {**metrics, "num_tokens": float(self.num_tokens)}

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise InvariantViolation(
                who=self.role or "model",
                phase=f"update of step {step}",
                reason=f"{' and '.join(bad)}; the weights are still those of the step before",
                next_step="lower learning_rate, or look at the rows of this step",
            )

    def _check_gradients(self, step: int) -> None:
        missing = self.check.missing()
        if missing:
            shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            raise InvariantViolation(
                who=self.role or "model",
                phase=f"update of step {step}",
                reason=f"{len(missing)} trainable parameters got no gradient: {shown}",
                next_step="take their group out of model.lora.targets, or report this architecture",
            )

    def save(self, directory: Path) -> None:
        """Write a checkpoint's files into `directory`."""
        state = {
            **self._settings(),
            "step": self.steps_done,
            "num_tokens": self.num_tokens,
            "scheduler": self.scheduler.state_dict(),
        }
        checkpoint.write_checkpoint(directory, self.flat, self.optimizer, state)

    def load(self, directory: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: incomplete, damaged, or made with other settings.
        """
        state = checkpoint.read_checkpoint(directory, self.flat, self.optimizer, self._settings())
        self.scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.steps_done, self.num_tokens = int(state["step"]), int(state["num_tokens"])

    def _settings(self) -> dict[str, object]:
        return {"total_steps": self.total_steps, "optim": self.spec.model_dump(mode="json")}
