"""Weights from the trainer to the rollout engines: protocol, channel, payload, proof."""
