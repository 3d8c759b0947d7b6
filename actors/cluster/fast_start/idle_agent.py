"""Idle process in the place of Ray's node agent, for as long as the node lives (see `lean_ray.py`)."""

import ctypes
import os
import signal
import time

if __name__ == "__main__":
    node = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the node, however it ends
    while os.getppid() == node:
        time.sleep(1)
