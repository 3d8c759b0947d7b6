"""Online stages: sample, score, estimate advantages, update, sync."""
