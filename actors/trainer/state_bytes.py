"""Bytes of tensors as numpy arrays, whatever their dtype and device, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> np.ndarray:
    """uint8 (bytes,): of a tensor on the CPU its own memory, where that is in one piece."""
    flat = tensor.detach().reshape(-1).cpu()
    found: np.ndarray = flat.view(torch.uint8).numpy()
    return found


def tensor_of(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """`bytes_of` again, one-dimensional: a copy."""
    # A copy by numpy: what comes out of Ray's object store is read-only, which torch warns of.
    return torch.from_numpy(array.copy()).view(dtype)


def fill(target: Tensor, array: np.ndarray) -> None:
    """Set a tensor, in place, to what `bytes_of` said of one of its shape."""
    with torch.no_grad():
        target.copy_(tensor_of(array, target.dtype).reshape(target.shape))
