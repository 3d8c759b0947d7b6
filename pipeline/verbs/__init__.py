"""The verbs of `raylign`: a Typer each for those about a run, a cluster and a model."""
