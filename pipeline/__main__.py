"""`python -m pipeline`: the same as `raylign`, where only the code was shipped (Ray jobs)."""

from __future__ import annotations

import sys

try:
    from pipeline.cli.app import main
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "actors":
        raise
    sys.exit(
        f"error: {error}: another package named `actors` hides Raylign's; rename it, or run `raylign` from "
        "another directory and without it on PYTHONPATH"
    )

if __name__ == "__main__":
    sys.exit(main())
