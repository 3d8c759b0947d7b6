"""Upstairs: what runs, in which order, on what, with which data, and what came out."""
