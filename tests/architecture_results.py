"""Figures of the tests of architectures, for docs/architectures.md."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

VARIABLE = "RAYLIGN_ARCHITECTURE_RESULTS"
"""Names the file to write them to; `make test-architectures` sets it to docs/architectures.json."""
LIBRARIES = ("vllm", "transformers", "peft", "torch")


def record(model_type: str, **figures: float) -> None:
    """Keep figures of one architecture, named as in `architecture_page.FIGURES`, where asked to."""
    named = os.environ.get(VARIABLE)
    if not named:
        return
    file = Path(named)
    kept = json.loads(file.read_text()) if file.is_file() else {"figures": {}}
    kept["versions"] = {name: _installed(name) for name in LIBRARIES}
    kept["figures"].setdefault(model_type, {}).update({k: float(f"{v:.3g}") for k, v in figures.items()})
    file.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def _installed(library: str) -> str:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(library)
    except PackageNotFoundError:
        return version(f"{library}-cpu")
