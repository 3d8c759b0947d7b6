"""Side-by-side measurements against other ways to do the same training. See docs/benchmarks.md."""
