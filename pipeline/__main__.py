"""`python -m pipeline`: the same as `raylign`, where only the code was shipped (Ray jobs)."""

from __future__ import annotations

import sys

try:
    from pipeline.cli.app import main
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing == "pipeline":
        raise
    sys.exit(
        f"error: {error}: another package named `actors` hides Raylign's; rename it, or run `raylign` from "
        "another directory and without it on PYTHONPATH"
        if missing == "actors"
        else f"error: {error}, which Raylign needs, for {sys.executable}: every node of a cluster "
        "needs the same Python and packages as the machine that runs are submitted from (make install)"
    )

if __name__ == "__main__":
    sys.exit(main())
