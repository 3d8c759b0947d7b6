"""Mixture-of-experts layers: forward pass, expert parallel, router statistics and replay."""
