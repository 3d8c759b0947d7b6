"""Reward functions behind one call with a deadline."""
