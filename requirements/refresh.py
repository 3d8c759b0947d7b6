"""Resolve the CPU and dev requirements anew and write them as full pins (`make lock`).

pip resolves without installing and reports what it chose, in about five minutes. Left out are the
packages whose registry builds are CUDA builds (see the head of cpu.txt) and everything that only those
need.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = re.compile(r"^(torchvision|torchaudio|torchcodec|triton|nvidia-.*|cuda-.*|raylign)$")


def resolve(extras: str, fixed: dict[str, str] | None = None) -> dict[str, str]:
    """Name -> version of everything that pip would install for the given extras, with `fixed` versions."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(f"{name}=={version}\n" for name, version in (fixed or {}).items())
        constraints.flush()
        command += ["--constraint", constraints.name, "--report", "-", f"{HERE.parent}[{extras}]"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"pip could not resolve [{extras}]:\n{done.stderr}")
    report = json.loads(done.stdout)
    packages = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    return {name: version for name, version in packages.items() if not LEFT_OUT.match(name.lower())}


def write(path: Path, packages: dict[str, str]) -> None:
    """Replace the pins of a lock file, keeping its leading comment."""
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    pins = sorted((f"{name}=={version}" for name, version in packages.items()), key=str.lower)
    path.write_text("\n".join(head + pins) + "\n")
    print(f"{path.name}: {len(pins)} pins")


def main() -> None:
    cpu = resolve("cpu")
    dev = {name: version for name, version in resolve("cpu,dev", cpu).items() if name not in cpu}
    cpu["torch"] = cpu["torch"].split("+")[0] + "+cpu"
    write(HERE / "cpu.txt", cpu)
    write(HERE / "dev.txt", dev)


if __name__ == "__main__":
    main()
