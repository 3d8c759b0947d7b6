"""Stands where Ray's node wants an agent to run, for as long as the node does (see `actors.cluster.fast_start.lean_ray`)."""

import ctypes
import os
import signal
import time

if __name__ == "__main__":
    node = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the node, however it ends
    while os.getppid() == node:
        time.sleep(1)
