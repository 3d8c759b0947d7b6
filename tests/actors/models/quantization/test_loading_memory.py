"""Memory of a process that loads a quantised base: at no time that of the base in 32 bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from actors.models.tiny import write_tiny_base

MEASURE = """
import gc, sys, threading, time
import torch
from actors.models.base.loading import load_base
from actors.models.quantization.quantised_tensor import quantised_bytes
from actors.models.spec import ModelSpec

def own_bytes():  # Without pages of files, which the kernel takes back when it needs them.
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) * 1024

small, large = sys.argv[1:]
load_base(ModelSpec(base=small, quantization="nf4"))
gc.collect()
before, peak, over = own_bytes(), 0, threading.Event()

def watch():
    global peak
    while not over.wait(0.002):
        peak = max(peak, own_bytes())

watching = threading.Thread(target=watch)
watching.start()
model = load_base(ModelSpec(base=large, quantization="nf4"))
over.set()
watching.join()
print(peak - before, sum(p.numel() for p in model.parameters()) * 4, quantised_bytes(model)[0])
"""


@pytest.mark.slow
def test_the_base_in_32_bits_is_never_whole_in_memory(tiny_base: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 6}
    write_tiny_base(tmp_path, seed=0, **sizes)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tiny_base), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, whole, quantised = map(int, done.stdout.split()[-3:])
    assert whole > 300e6
    # One stack of experts in float32 and what it is made into, beside what is loaded so far.
    assert quantised < peak < 0.45 * whole
