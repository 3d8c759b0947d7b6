"""Runs as Ray jobs: shipping, submitting, following, stopping."""
