"""Resolve the CPU and dev requirements anew and write them as full pins (`make lock`).

pip resolves without installing and reports what it chose. Left out are the packages whose registry
builds are CUDA builds (see the head of cpu.txt) and everything that only those need.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = re.compile(r"^(torchvision|torchaudio|torchcodec|triton|nvidia-.*|cuda-.*|raylign)$")


def resolve(extras: str) -> dict[str, str]:
    """Name -> version of everything that pip would install for the given extras."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--report", "-", f"{HERE.parent}[{extras}]"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    packages = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    return {name: version for name, version in packages.items() if not LEFT_OUT.match(name.lower())}


def write(path: Path, packages: dict[str, str]) -> None:
    """Replace the pins of a lock file, keeping its leading comment."""
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    pins = [f"{name}=={version}" for name, version in sorted(packages.items(), key=lambda p: p[0].lower())]
    path.write_text("\n".join(head + pins) + "\n")
    print(f"{path.name}: {len(pins)} pins")


def main() -> None:
    cpu = resolve("cpu")
    cpu["torch"] = cpu["torch"].split("+")[0] + "+cpu"
    dev = {name: version for name, version in resolve("cpu,dev").items() if name not in cpu}
    write(HERE / "cpu.txt", cpu)
    write(HERE / "dev.txt", dev)


if __name__ == "__main__":
    main()
