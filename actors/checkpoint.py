"""Training state on disk: parameters, optimizer and schedule; resuming from it is exact to the bit.

Three files, none of them a pickle. The caller makes a checkpoint appear atomically (written aside,
renamed, manifest last); here an unreadable or foreign one is named and refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from actors.errors import UserError
from actors.optim import FlatParameters

PARAMETERS, OPTIMIZER, STATE = "parameters.safetensors", "optimizer.safetensors", "state.json"
FILES = (PARAMETERS, OPTIMIZER, STATE)


def write_checkpoint(
    directory: Path, flat: FlatParameters, optimizer: Optimizer, state: dict[str, Any]
) -> None:
    """Write parameters by name, the optimizer's tensors by bucket, and `state` (JSON) into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: p.detach().cpu().clone() for n, p in flat.parameters.items()}, directory / PARAMETERS)
    moments: dict[str, Tensor] = {}
    for index, bucket in enumerate(flat.buckets):
        for key, value in optimizer.state.get(bucket.flat, {}).items():
            if isinstance(value, Tensor):
                moments[f"{index}.{key}"] = value.detach().cpu().clone()
    save_file(moments, directory / OPTIMIZER)
    layout = [list(bucket.names) for bucket in flat.buckets]
    (directory / STATE).write_text(json.dumps({**state, "buckets": layout}) + "\n")


def read_checkpoint(
    directory: Path, flat: FlatParameters, optimizer: Optimizer, settings: dict[str, Any]
) -> dict[str, Any]:
    """Put a checkpoint's tensors in place and return its `state`.

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
        parameters, moments = load_file(directory / PARAMETERS), load_file(directory / OPTIMIZER)
        layout = state.pop("buckets")
    except Exception as error:  # safetensors raises its own type, json ValueError, a short file OSError
        raise UserError(_unusable(directory, f"can't be read ({error})")) from error
    ours = {name: tuple(p.shape) for name, p in flat.parameters.items()}
    theirs = {name: tuple(p.shape) for name, p in parameters.items()}
    if ours != theirs or layout != [list(b.names) for b in flat.buckets]:
        odd = sorted(set(ours.items()) ^ set(theirs.items()))[:3]
        raise UserError(_unusable(directory, f"holds other parameters than this run trains, e.g. {odd}"))
    changed = [key for key in settings if state.get(key) != settings[key]]
    if changed:
        raise UserError(_unusable(directory, f"was made with other settings: {', '.join(changed)}"))
    # Before its first step (a critic that learns alone at the start) an optimizer has no state yet.
    expected = _expected_moments(flat, optimizer) if state.get("step") else []
    if sorted(moments) != sorted(expected):
        raise UserError(_unusable(directory, f"{OPTIMIZER} lacks optimizer state"))
    with torch.no_grad():
        for name, parameter in flat.parameters.items():
            parameter.copy_(parameters[name])
    for index, bucket in enumerate(flat.buckets):
        mine = {k.split(".", 1)[1]: v for k, v in moments.items() if k.split(".", 1)[0] == str(index)}
        if mine:
            # Adam keeps `step` on the CPU unless it is fused or capturable; moments live beside the weights.
            on_device = getattr(optimizer, "defaults", {}).get("fused")
            optimizer.state[bucket.flat] = {
                k: v.to(bucket.flat.device) if k != "step" or on_device else v for k, v in mine.items()
            }
    return dict(state)


def _expected_moments(flat: FlatParameters, optimizer: Optimizer) -> list[str]:
    keys = ("step", "exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ()
    return [f"{index}.{key}" for index in range(len(flat.buckets)) for key in keys]


def _unusable(directory: Path, why: str) -> str:
    return f"checkpoint '{directory}': {why}. Remove that directory to go on from the one before it"
