"""Data: sources to rows to records (`reading`), records to tokens and loss masks (`tokens`)."""
