"""Parts of a weight sync on the device: packing, exact merge, digests; and the same bits on the CPU."""

from __future__ import annotations

import torch

from actors.models.lora.low_rank import Factors, low_rank_delta
from actors.models.lora.merge import adapter_factors
from actors.models.spec import LoraSpec
from actors.sync.digests import Digests, digest_of, integer_sums
from actors.sync.payload import pack_adapter, pack_merged
from actors.trainer.merged_weights import HostMerge, Tally
from actors.trainer.model_host import ModelHost
from benchmarks.gpu.check import Check, Deviation
from benchmarks.gpu.models import ROLE, fresh_host, settings, stir

DTYPE = "bfloat16"
LAYER = ".layers.0."


def run(check: Check) -> None:
    """Time one layer of the large base by parts, and compare what the CPU makes of the same weights."""
    host = fresh_host(check, LoraSpec(r=16, expert_rank="r/top_k"), num_hidden_layers=1)
    stir(host)
    factors = adapter_factors(host.state.model, ROLE)
    _adapter(check, factors)
    merge = HostMerge(host.state.base, factors, DTYPE)
    names = [name for name in merge.names if LAYER in name]
    tensors = _layer(check, merge, factors, names)
    found = _digests(tensors)
    del tensors, merge
    _same_on_the_cpu(check, host, factors, names, found)


def _adapter(check: Check, factors: dict[str, Factors]) -> None:
    payload = pack_adapter(0, DTYPE, factors, "sums")
    check.tell(
        part="adapter of one layer",
        bytes=payload.buffer.numel(),
        pack_s=check.seconds(lambda: pack_adapter(0, DTYPE, factors), 3, 1),
        digest_s=check.seconds(lambda: digest_of(payload.buffer, "sums"), 3, 1),
    )


def _layer(
    check: Check, merge: HostMerge, factors: dict[str, Factors], names: list[str]
) -> dict[str, torch.Tensor]:
    """Tell the parts of one layer's merge; its tensors."""
    tensors = merge.merged(names)
    size = sum(tensor.nbytes for tensor in tensors.values())
    check.watch_memory()
    seconds = {
        "delta_s": check.seconds(lambda: [low_rank_delta(f) for f in factors.values()], 3, 1),
        "merge_s": check.seconds(lambda: merge.merged(names), 3, 1),
        "digests_s": check.seconds(lambda: _digests(tensors), 3, 1),
        "digests_without_kernel_s": check.seconds(lambda: [integer_sums(t) for t in tensors.values()], 3, 1),
        "pack_s": check.seconds(lambda: pack_merged(0, DTYPE, tensors), 3, 1),
    }
    layers = settings(check)["num_hidden_layers"]
    check.tell(
        part="one layer merged",
        tensors=len(tensors),
        bytes=size,
        gib=check.peak_gib(),
        **seconds,
        # Base and result once each.
        copy_floor_s=None if check.bytes_per_s is None else 2 * size / check.bytes_per_s,
        all_layers_s=layers * (seconds["merge_s"] + seconds["digests_s"] + seconds["pack_s"]),
        layers=layers,
    )
    return tensors


def _same_on_the_cpu(
    check: Check, host: ModelHost, factors: dict[str, Factors], names: list[str], found: dict[str, str]
) -> None:
    """The model moves to the CPU, and is merged there by the same function."""
    copies = {n: Factors(f.a.cpu(), f.b.cpu(), f.scaling, f.transposed) for n, f in factors.items()}
    base, tally = host.state.base.to("cpu"), Tally("sums")
    seconds = check.once(lambda: HostMerge(base, copies, DTYPE).merged(names, tally))
    right = tally.expected().digests
    different = sorted(name for name, digest in right.items() if found.get(name) != digest)
    check.tell(
        part="the same on the CPU", merge_and_digests_s=seconds, tensors=len(found), different=len(different)
    )
    if different or not found:
        raise Deviation(f"{len(different)} of {len(found)} digests differ from the CPU's: {different[:3]}")


def _digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    taken = Digests("sums")
    for name, tensor in tensors.items():
        taken.take(name, tensor)
    return taken.read()
