"""Memory that some code takes at most, by a process of its own. Pages of files are left out: the kernel drops
and reads them again as it likes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

_WATCHED = """
import sys
from pathlib import Path
from threading import Event, Thread
{imports}

def memory():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while not done.wait(.002):
        peak.append(memory())

before, peak, done = memory(), [], Event()
watching = Thread(target=watch)
watching.start()
try:
    {code}
finally:
    done.set()
print(max(peak) - before)
"""


def peak_memory(imports: str, code: str, *arguments: object) -> int:
    """Bytes beyond those after `imports`; `code` is a line that finds `arguments` in sys.argv[1:]."""
    script = _WATCHED.format(imports=imports, code=code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)
