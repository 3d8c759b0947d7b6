"""Raylign from Python: the same stage with two learning rates, checked, planned, run and compared.

python examples/from_python.py [DIRECTORY]
"""

from __future__ import annotations

import sys
from typing import Any

from pipeline import RunResult, plan, run, validate

CONFIG: dict[str, Any] = {
    "name": "from-python",
    "model": {"base": "builtin:tiny-moe"},
    "stages": {
        "sft": {
            "data": {"source": "builtin:arithmetic", "split": "train"},
            "max_steps": 20,
        }
    },
}
"""As in a YAML file; `run("my-run.yaml", ["stages.sft.learning_rate=1e-3"])` takes one."""


def main(directory: str) -> dict[str, RunResult]:
    """Train with each learning rate; the results by rate."""
    results = {}
    for rate in ("1e-4", "1e-3"):
        overrides = [f"stages.sft.learning_rate={rate}", f"output_dir={directory}/{rate}"]
        findings = validate(CONFIG, overrides)
        if findings.problems:
            raise SystemExit("\n".join(findings.problems))
        asked = plan(CONFIG, overrides)
        print(f"learning rate {rate}: {asked.processes} process, {asked.resources}")
        results[rate] = run(CONFIG, overrides)
    for rate, result in results.items():
        stage = result.stages["sft"]
        print(f"learning rate {rate}: loss {stage.metrics['loss']:.3f}, adapter in {stage.weights}")
    return results


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/from-python")
