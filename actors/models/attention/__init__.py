"""Attention of padding-free rows, one sequence at a time."""
