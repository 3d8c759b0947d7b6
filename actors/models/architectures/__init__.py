"""Table of architectures for transformers and vLLM, and what follows from a row."""
