"""The first word of a command: said before anything that takes long to import has been."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pipeline.monitoring.progress import Progress

def first_word(self, text):
    libraries = ("torch", "transformers", "datasets", "ray", "vllm", "matplotlib")
    heavy = [name for name in libraries if name in sys.modules]
    print(text, heavy, sep="|")
    sys.stdout.flush()
    sys.exit(0)

Progress._print_phase = first_word
from pipeline.cli.app import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "configs/demo.yaml"], "reading configs/demo.yaml"),
        (["validate", "configs/demo.yaml"], "reading configs/demo.yaml"),
        (["submit", "configs/demo.yaml"], "reading configs/demo.yaml"),
        (["eval", "configs/demo.yaml"], "reading configs/demo.yaml"),
        (["chat", "somewhere"], "reading somewhere"),
        (["inspect", "builtin:arithmetic"], "reading builtin:tiny-moe"),
        (["inspect", "configs/demo.yaml"], "reading configs/demo.yaml"),
        (["merge", "one", "two"], "merging one into its base, and comparing both"),
        (["report", "one"], "reading one, and drawing"),
        (["compare", "one", "two"], "reading the runs, and drawing"),
        (["status"], "asking the cluster"),
        (["env"], "asking torch and the hub"),
    ],
)
def test_the_first_word_comes_before_anything_heavy(
    arguments: list[str], said: str, repository: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[0] == f"{said}|[]"
