"""Faults of vLLM that architectures run into: causes, fixes, and digests of the code concerned."""
