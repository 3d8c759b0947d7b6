"""Faults of vLLM that architectures run into: causes, fixes, digests of the code that they were written for."""
