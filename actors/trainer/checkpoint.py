"""Training state on disk: parameters, optimizer and schedule; resuming from it is exact to the bit.

Three files, none of them a pickle, with whole tensors by parameter: neither how ranks split the weights nor
how many ranks there are shows in them. The caller makes a checkpoint appear atomically (written aside,
renamed, manifest last); here an unreadable or foreign one is named and refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from actors.errors import UserError
from actors.models.parallel.fsdp import own_part, put_, whole, whole_of
from actors.trainer.parameter_buckets import Bucket
from actors.trainer.streamed_safetensors import DeferredTensor, write_tensors

PARAMETERS, OPTIMIZER, STATE = "parameters.safetensors", "optimizer.safetensors", "state.json"
FILES = (PARAMETERS, OPTIMIZER, STATE)


class Trained(Protocol):
    """Parameters in training and their optimizer, as `actors.trainer.train_state.Training` has them."""

    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer

    @property
    def buckets(self) -> list[Bucket]: ...


def write_checkpoint(directory: Path, trained: Trained, state: dict[str, Any], write: bool = True) -> None:
    """Write parameters, the optimizer's moments and `state` (JSON) into `directory`.

    Collective where parameters are sharded; `write` is False on ranks that only hand over their slices.
    """
    if write:
        directory.mkdir(parents=True, exist_ok=True)
    parameters = trained.parameters
    entries = [_entry(name, p, partial(whole, p)) for name, p in parameters.items()]
    write_tensors(directory / PARAMETERS, entries, write)
    steps = _steps(trained)
    moments = _moments(trained)
    entries = [
        _entry(f"{key}.{name}", p, partial(whole_of, moments[name].get(key), p))
        for name, p in parameters.items()
        for key in (_keys(trained) if steps else ())
    ]
    write_tensors(directory / OPTIMIZER, entries, write)
    if write:
        (directory / STATE).write_text(json.dumps({**state, "optimizer_steps": steps}) + "\n")


def read_checkpoint(directory: Path, trained: Trained, settings: dict[str, Any]) -> dict[str, Any]:
    """Put a checkpoint's tensors in place, of sharded ones this rank's part, and return its `state`.

    Nothing is changed unless the whole checkpoint is readable and fits.

    Args:
        settings: items of `state` that must be the same now, such as the schedule's length.

    Raises:
        UserError: a file is missing, damaged, or of another model, other parameters or settings.
    """
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise UserError(_unusable(directory, f"{', '.join(missing)} missing"))
    try:
        state = json.loads((directory / STATE).read_text())
        parameters = safe_open(directory / PARAMETERS, "pt")
        optimizer = safe_open(directory / OPTIMIZER, "pt")
        theirs = {name: tuple(parameters.get_slice(name).get_shape()) for name in parameters.keys()}  # noqa: SIM118
        steps = int(state.pop("optimizer_steps"))
    except Exception as error:  # safetensors raises its own type, json ValueError, a short file OSError
        raise UserError(_unusable(directory, f"can't be read ({error})")) from error
    ours = {name: tuple(p.shape) for name, p in trained.parameters.items()}
    if ours != theirs:
        odd = sorted(set(ours.items()) ^ set(theirs.items()))[:3]
        raise UserError(_unusable(directory, f"holds other parameters than this run trains, e.g. {odd}"))
    changed = [key for key in settings if state.get(key) != settings[key]]
    if changed:
        raise UserError(_unusable(directory, f"was made with other settings: {', '.join(changed)}"))
    # Before its first step (a critic that learns alone at the start) an optimizer has no state yet.
    keys = _keys(trained) if steps else ()
    if sorted(optimizer.keys()) != sorted(f"{key}.{name}" for key in keys for name in ours):
        raise UserError(_unusable(directory, f"{OPTIMIZER} lacks optimizer state"))
    for name, parameter in trained.parameters.items():
        put_(parameter, parameters.get_slice(name))
    if steps and keys:
        _set_moments(trained, optimizer, keys, steps)
    return dict(state)


def _keys(trained: Trained) -> tuple[str, ...]:
    """Names of the optimizer's state per element."""
    return ("exp_avg", "exp_avg_sq") if isinstance(trained.optimizer, torch.optim.AdamW) else ()


def _steps(trained: Trained) -> int:
    """Steps that the optimizer has taken."""
    found = [trained.optimizer.state.get(b.flat, {}).get("step") for b in trained.buckets]
    return max((int(step) for step in found if step is not None), default=0)


def _moments(trained: Trained) -> dict[str, dict[str, Tensor]]:
    """By parameter and kind: this rank's part of a moment; empty without one."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in trained.parameters}
    for bucket in trained.buckets:
        for key in _keys(trained):
            flat = trained.optimizer.state.get(bucket.flat, {}).get(key)
            for name, view in (bucket.views(flat) if flat is not None else {}).items():
                found[name][key] = view
    return found


def _set_moments(trained: Trained, file: safe_open, keys: tuple[str, ...], steps: int) -> None:
    optimizer = trained.optimizer
    for bucket in trained.buckets:
        # Adam keeps `step` on the CPU unless it is fused; moments live beside the weights.
        device = bucket.flat.device if optimizer.defaults.get("fused") else torch.device("cpu")
        state = {key: torch.zeros_like(bucket.flat) for key in keys}
        for key, flat in state.items():
            for name, view in bucket.views(flat).items():
                view.copy_(own_part(file.get_slice(f"{key}.{name}"), trained.parameters[name]))
        optimizer.state[bucket.flat] = {"step": torch.tensor(float(steps), device=device), **state}


def _entry(name: str, like: nn.Parameter, make: Callable[[], Tensor]) -> DeferredTensor:
    return DeferredTensor(name, like.shape, like.dtype, make)


def _unusable(directory: Path, why: str) -> str:
    return f"checkpoint '{directory}': {why}. Remove that directory to go on from the one before it"
