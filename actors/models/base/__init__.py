"""Base models: found, loaded, and digested."""
