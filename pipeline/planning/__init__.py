"""Plan of a run: the graph of its stages, its resources and the rules that it has to keep. Starts nothing."""
