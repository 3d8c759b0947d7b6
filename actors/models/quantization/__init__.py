"""A frozen base in 4 or 8 bits: codecs, quantised weights as tensors, which weights of a model they are."""
