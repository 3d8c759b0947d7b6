"""Settings of each kind of stage, and what the rest of the pipeline asks of a kind."""
