"""Everything that works in a Ray process: trainer, rollout engines, weight sync. Never imports `pipeline`."""
