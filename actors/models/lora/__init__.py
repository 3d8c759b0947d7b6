"""LoRA: targets, adapters and their files, linear layers and experts, heads, merging."""
