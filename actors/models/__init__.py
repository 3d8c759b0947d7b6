"""Language models: bases and their architectures, LoRA, experts, ranks that share one model."""
