"""The clock of deadlines does not count the time for which this process was stopped."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

from actors.cluster.patient_clock import GAP_S, PatientClock


def test_a_long_gap_between_two_looks_counts_as_a_short_one() -> None:
    now = [100.0]
    clock = PatientClock(lambda: now[0])
    for _ in range(10):
        now[0] += 0.5
        clock()
    assert clock() == 5
    now[0] += 600
    assert clock() == 5 + GAP_S
    now[0] += 1
    assert clock() == 6 + GAP_S


WAITING = """
import time
from actors.cluster import patient_clock
patient_clock.GAP_S = 0.5
clock = patient_clock.PatientClock()
print("there", flush=True)
until = time.monotonic() + 4
while time.monotonic() < until:
    clock()
    time.sleep(0.05)
print(clock(), flush=True)
"""


def test_a_process_that_was_stopped_has_not_waited() -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    time.sleep(0.5)
    psutil.Process(process.pid).suspend()
    time.sleep(2)
    psutil.Process(process.pid).resume()
    assert 2 <= float(process.communicate(timeout=60)[0]) < 3
