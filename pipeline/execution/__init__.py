"""One run, in the order in which things happen: processes, stages, evaluation, end."""
