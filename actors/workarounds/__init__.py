"""Faults of vLLM that some architectures run into, and what is done about each."""
