"""Sections of `benchmarks.gpu_check`: each measures one thing on one device, and writes lines of figures."""
