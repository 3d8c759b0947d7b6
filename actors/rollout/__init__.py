"""vLLM engines in their processes, and several of them as one pool."""
