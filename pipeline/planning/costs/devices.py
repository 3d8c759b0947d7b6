"""Devices that a plan is made for: their memory, and rates of products, memory and wires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
Name = Literal["h100-80", "h200", "a100-80", "l40s", "cpu"]


@dataclass(frozen=True)
class Device:
    """One kind of GPU, or a machine without any."""

    name: str
    memory: int
    """Bytes of one GPU; of the machine where there is none."""
    products: float
    """Multiplications and additions a second in large products, each counted as one operation (two for a
    multiply-add); in 16 bits on a GPU, in float32 on a CPU."""
    bandwidth: float
    """Bytes a second between its memory and its units."""
    attention: float
    """Operations a second in attention."""
    logits: float
    """Logits a second that the loss turns into probabilities."""
    link: float
    """Bytes a second from one process of a node to another, one way: NVLink or PCIe; loopback."""
    network: float
    """Bytes a second between nodes."""
    per_node: int
    """GPUs of a node; 0: a CPU."""
    measured: bool
    """Rates were measured on this machine; else they are the data sheet's, times the shares below."""

    @property
    def is_gpu(self) -> bool:
        return self.per_node > 0

    @property
    def room(self) -> int:
        """Bytes that may be planned with."""
        return int(self.memory * (1 - UNPLANNED))


UNPLANNED = 0.03
"""Share of a device that nobody plans with: gaps between blocks, workspaces of libraries (as
`actors.cluster.turn_plan.RESERVE`)."""
OF_PRODUCTS, OF_ATTENTION, OF_MEMORY, OF_WIRES = 0.4, 0.3, 0.7, 0.6
"""Shares of a data sheet's rates that training reaches. Assumed, not measured."""
BYTES_OF_A_LOGIT = 32
"""Read and written for a logit by the kernels of the loss, float32, eight times. Assumed, not measured."""


def _gpu(name: Name, gb: int, tflops: float, tb_s: float, link_gb_s: float) -> Device:
    return Device(
        name=name,
        memory=gb * 10**9,
        products=OF_PRODUCTS * tflops * 1e12,
        bandwidth=OF_MEMORY * tb_s * 1e12,
        attention=OF_ATTENTION * tflops * 1e12,
        logits=OF_MEMORY * tb_s * 1e12 / BYTES_OF_A_LOGIT,
        link=OF_WIRES * link_gb_s * 1e9,
        network=OF_WIRES * 50e9,
        per_node=8,
        measured=False,
    )


GPUS: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("h100-80", 80, 989, 3.35, 450),
        _gpu("h200", 141, 989, 4.8, 450),
        _gpu("a100-80", 80, 312, 2.04, 300),
        _gpu("l40s", 48, 362, 0.864, 32),
    )
}
"""By NVIDIA's data sheets: bfloat16 without sparsity, memory, NVLink one way (l40s: PCIe 4). A network of 400
Gb/s between nodes of eight is assumed."""
DEFAULT_GPU = "h100-80"


def cpu(memory: int) -> Device:
    """A machine of this memory, at rates of one core (assumed; `actors.models.speed` measures them)."""
    return Device("cpu", memory, 5e10, 1e10, 2e10, 3e8, 1e9, 1e9, 0, measured=False)
