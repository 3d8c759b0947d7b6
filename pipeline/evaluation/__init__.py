"""Held-out prompts through the engines, and held-out pairs through a reward model."""
