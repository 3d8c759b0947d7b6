"""`python -m pipeline`: the same as `raylign`, where only the code was shipped (Ray jobs)."""

from __future__ import annotations

import sys

from pipeline.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
